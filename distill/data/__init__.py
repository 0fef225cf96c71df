"""What a student learns from: captioned pictures, and the latent cache made of them."""
