"""M-MATE inside a Hugging Face model; README.md tells how."""
