"""How another process of this host controls an arena: a unix socket that the owner of the arena serves.

Each request has one answer, and each message is a 32-bit length (big endian) and a MessagePack map with the name of
the message under `type`. The description carries a descriptor of the memory::

    client (a migration, a checkpoint)          owner of the arena
      │ ── Describe ─────────────────────────▶ │
      │ ◀──────────── Description + descriptor ─ │  regions, processes that map them
      │ ── Pause ────────────────────────────▶ │  on_pause
      │ ◀─────────────────────────────── Done ─ │  ← nothing writes any more, as long as this client lives
      │ ── SaveState ────────────────────────▶ │
      │ ◀────────────────── StateIs, n pieces ─ │
      │ ── Commit ───────────────────────────▶ │  ← from here the memory stays paused even if the client dies
      │ ◀─────────────────────────────── Done ─ │
      │ ── Discard (or Resume) ──────────────▶ │  on_moved (on_resume)
      │ ◀─────────────────────────────── Done ─ │

A client that goes away between Pause and Commit lets the program run on at once: the kernel closes its socket however
it dies. After Commit another client may say Resume or Discard, once it knows what became of the migration. Who may do
what when is decided by `workloads.lifecycle`; a request that does not fit is answered by Refused, and nothing happens.

Only the user that owns the program, and root, may connect: the socket is 0600, and the peer is asked for its
credentials.
"""
