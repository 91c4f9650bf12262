"""Everything that is SQL: per-user histories, positions, names, items and published snapshots, and the hot histories in memory."""
