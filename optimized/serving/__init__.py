"""Students behind an OpenAI-compatible server; README.md says how.

__main__    `python -m linmu.optimized.serving DIR`: transformers' own server, one request at a time
vllm_plugin    `vllm serve DIR`: many at once, a state of constant size for each
benchmark    what vLLM holds and decodes of a student and of its teacher
report    tables and a plot of that
filled_keys_and_values    what stands for the teacher's prompts where it decodes
"""
