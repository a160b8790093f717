"""Graph distillation."""
