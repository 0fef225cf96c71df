"""What is measured about distillation: importance, ablation, the speed of a step."""
