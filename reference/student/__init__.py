"""M-MATE inside a Hugging Face model: a teacher in, a student out."""

import transformers  # noqa: F401  # its import registers the students, which needs this package's modules whole
