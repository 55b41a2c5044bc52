"""The torch engine of the scan: both directions as matrices over chunks of tokens, forward and backward.

Letters: B batch, L tokens, H heads, G groups, N state size, P head dim, K chunks of C tokens. Inside a chunk
i is the reading and j the writing token; S_F is the forward state before a chunk, S_R the reverse state after
it.

    f_i = Σ_{k≤i} a_k,  a = dt A          b_i = Σ_{k<i} a_k over vision only                              (1)
    W_ij = dt_j · (gF_i [j≤i] exp(f_i - f_j) + gR_i [j≥i, one segment] exp(b_j - b_i))                     (2)
    y_i = Σ_j W_ij (C_i·B_j) x_j  +  gF_i e^{f_i} S_Fᵀ C_i  +  gR_i e^{b_end - b_i} S_Rᵀ C_i  +  D x_i     (3)
    S_F(next chunk)     = e^{f_end} S_F + Σ_j e^{f_end - f_j} dt_j B_j ⊗ x_j                              (4)
    S_R(previous chunk) = e^{b_end} S_R + Σ_j e^{b_j} dt_j B_j ⊗ x_j      j of the segment that is read    (5)

gF is the gate on vision and 1 on text, gR is 1 - gate on vision and 0 on text: one C Bᵀ serves both
directions, the forward weights below its diagonal, the reverse weights above. All exponents are differences
≤ 0 and clamped there. This is Mamba2's chunked form (arXiv 2405.21060, section 6) of `reference/scan.py`,
eqs. (1) to (4). Time and memory are linear in L; work goes through slabs of chunks small enough for a
processor's cache.

Of packed rows a pair of (2) is of one sample, and what (3) reads of S_F, and (4) writes to it and leaves of
it, is 0 for the tokens of another sample than the state's. Segments never lie in two.

forward     eq. (3), then the norm and the order       norm     each head's, both passes
backward    the gradients, everything recomputed       decays   the scalars of eq. (1)
states      what enters and leaves the chunks          chunks   the tokens in chunks, and their pairs
"""
