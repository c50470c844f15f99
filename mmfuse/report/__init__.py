"""The imbalance report: how much a trained model owes to each modality, and who is behind."""
