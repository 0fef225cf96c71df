"""What is done to a checkpoint before it is exported: another VAE, LoRAs fused."""
