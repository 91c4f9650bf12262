"""The recommender: HSTU over histories, a growing item table, its losses and optimiser, and the snapshot format."""
