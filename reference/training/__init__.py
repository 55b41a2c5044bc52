"""One distillation, from settings to a student's folder; README.md tells it in order."""

import transformers  # noqa: F401  # its import registers the students, which needs this package's modules whole
