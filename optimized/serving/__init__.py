"""Students behind an OpenAI-compatible server; README.md says how.

__main__    `python -m linmu.optimized.serving DIR`: transformers' own server, one request at a time
vllm_plugin    `vllm serve DIR`: many at once, a state of constant size for each
"""
