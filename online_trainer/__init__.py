"""The online trainer: poll, batch, test, train, checkpoint, publish; each interaction is learned from exactly once."""
