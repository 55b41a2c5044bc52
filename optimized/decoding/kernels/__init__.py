"""The Triton engine of decoding: `scan_step`, and `text_step` with its projections."""
