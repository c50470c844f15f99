"""The imbalance report: how much a trained model owes to each modality, and which one is behind."""
