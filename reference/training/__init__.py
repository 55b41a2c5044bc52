"""One distillation, from settings to a student's folder; README.md tells it in order."""
