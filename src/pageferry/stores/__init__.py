"""Images in object stores: a manifest per image, and packs with the storage blocks of all images."""
