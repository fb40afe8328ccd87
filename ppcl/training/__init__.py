"""Training of replacements: what distillation and fine-tuning share."""
