"""What several tests share: small models, checkpoints, process ranks, stand-ins for engines."""
