"""Everything that is SQL: histories, positions, names, items, published snapshots; and the hot histories in memory."""
