"""Arguments of each verb, in modules that import no part of its work."""
