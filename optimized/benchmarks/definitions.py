"""What each table measures, in words that stand above it."""

TITLES = {
    "scan": "Bidirectional scan",
    "windows": "Window attention",
    "ttft": "Time to first token",
    "decode": "Decoding",
    "training": "Training step",
}
DEFINITIONS = {
    "scan": (
        "One call of `bidirectional_scan`, or one and its gradients. FLOPs: a scan in chunks of 64 "
        "tokens whose two directions share one product of C and B; bytes: every input and output "
        "once; backward counts twice the forward's FLOPs. The same counts stand for every method, "
        "causal attention excepted, which does another job. The prompt is one video of 80 % of the "
        "tokens, in one piece, so that a peer's backward direction is a slice."
    ),
    "windows": (
        "One call of `window_attention`, or one and its gradients, over whole windows of 4 × 8 × 8 "
        "tokens, 80 % of the prompt. What depends on the layout alone (the plan of the windows, order of "
        "the tokens, block masks) is not timed."
    ),
    "ttft": (
        "One forward from embeddings, or from pixels, to the next token's logits and the cache; "
        "random weights. Memory is the peak of weights, inputs and pass. LinMU's time contains "
        "finding the scan order and the windows. The MLPs of both models take the prompt in slices of"
        " 16,384 tokens; on a GPU, torch.compile fuses norms and MLPs of both. What takes 15 s or more is"
        " run once."
    ),
    "decode": (
        "Chains of 8 steps of one token after a prompt of that length, replayed from a CUDA graph "
        "where there is a GPU; the time is that of a chain. Caches hold random numbers. The teacher "
        "reads exactly the keys and values it may see, without a mask. The weights of both models are"
        " in memory at once; on a GPU, torch.compile fuses norms and MLPs of both. The largest batch is"
        " what 85 % of the free memory holds; the ratio compares tokens per second."
    ),
    "training": (
        "One optimizer step on one prompt with its pixels: forward, backward with layers recomputed, "
        "clipping, AdamW. Memory is the peak of everything."
    ),
}
METHOD = (
    "Times are medians; the spread is the distance between the 20th and 80th percentiles over the "
    "median. Everything ran once before it was timed. *Of the floor* is the larger of bytes over the "
    "bandwidth and FLOPs over the rate above, both measured in the same run, over the time. *LinMU is"
    " faster* is a method's time over LinMU's: below 1 the other one wins. Causal attention does "
    "another job, the one that the scan stands in for. Every operator's result, and gradient, was "
    "compared with the torch engine in float32 before it was timed."
)
