"""Control of an arena by another process of this host, over a Unix socket that is served by the owner of the arena.

Each request has one reply. Each message is a 32-bit length (big endian) and a MessagePack map with the name of the
message under `type`. A descriptor of the memory is sent with the description::

    client (a migration, a checkpoint)          owner of the arena
      │ ── Describe ─────────────────────────▶ │
      │ ◀──────────── Description + descriptor ─ │  regions, processes that map them
      │ ── Pause ────────────────────────────▶ │  on_pause
      │ ◀─────────────────────────────── Done ─ │  ← no more writes, as long as this client is connected
      │ ── SaveState ────────────────────────▶ │
      │ ◀────────────────── StateReply, n chunks ─ │
      │ ── Commit ───────────────────────────▶ │  ← from here the arena stays paused even if the client exits
      │ ◀─────────────────────────────── Done ─ │
      │ ── Discard (or Resume) ──────────────▶ │  on_moved (on_resume)
      │ ◀─────────────────────────────── Done ─ │

If a client disconnects between Pause and Commit, the program continues at once: the kernel closes the socket regardless
of how the client exits. After Commit another client may send Resume or Discard, once it knows the outcome of the
migration. `workloads.lifecycle` decides which requests are permitted. The reply to any other request is Refused, and
nothing is changed.

Only the user that owns the program, and root, may connect: the socket has mode 0600, and the server checks the
credentials of the peer (SO_PEERCRED).
"""
