"""How operators are called, and what kind of layer each is: one list for captured networks and for profiler traces."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from ptsim.network import Layer, LayerKind

# What pruning leaves where it removed a layer, and at the end of a residual branch that it removed.
PLACEHOLDER, BRANCH_CONSTANT = "placeholder", "branch_constant"
SCALED_SUMS = frozenset({"scaled_add", "scaled_sub"})  # `torch.add(x, y, alpha=2)`: no spelling of theirs is torch's
IN_PARTS = frozenset({"chunk", "split", "tensor_split", "unbind"})  # give several tensors
SUMS, DIFFERENCES = frozenset({"add"}), frozenset({"sub", "rsub"})  # by their plain names
BILINEAR = "bilinear"  # y[o] = Σ x[i]·w[o, i, j]·z[j]: of the linear kind, a weight for each pair of features
# What channel gating (`prune.gating`) makes of a layer X and of a BatchNorm X, and what it puts beside them.
_GATES = "gather", "scatter"
_GATED = "layer", "norm", *_GATES

_OPS: dict[LayerKind, str] = {
    LayerKind.CONV: "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d",
    LayerKind.LINEAR: "linear bilinear",
    LayerKind.BATCH_NORM: "batch_norm sync_batch_norm",
    LayerKind.NORM: "layer_norm group_norm instance_norm local_response_norm rms_norm normalize",
    LayerKind.ACTIVATION: """
        relu relu6 leaky_relu prelu rrelu elu celu selu gelu silu mish sigmoid logsigmoid tanh hardtanh hardswish
        hardsigmoid hardshrink softshrink tanhshrink threshold softplus softsign softmax log_softmax softmin glu
        gumbel_softmax clamp clip erf""",
    LayerKind.POOL: """
        avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d lp_pool1d lp_pool2d lp_pool3d
        adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
        adaptive_max_pool3d fractional_max_pool2d mean sum amax amin max min reduce var std interpolate upsample
        grid_sample""",
    LayerKind.ELEMENTWISE: """
        add sub rsub mul div rdiv truediv true_divide floordiv neg pos pow square sqrt rsqrt exp log log1p abs maximum
        minimum where lerp scaled_add scaled_sub twofold addcmul addcdiv reciprocal sin cos
        masked_fill type to float half bfloat16 double type_as""",
    LayerKind.CONCAT: "cat concat concatenate stack hstack vstack dstack",
    LayerKind.DROPOUT: """
        dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout stochastic_depth
        drop_path drop_block2d""",
    LayerKind.MATMUL: """
        matmul bmm mm baddbmm addmm addbmm einsum tensordot scaled_dot_product_attention multihead_attention""",
    LayerKind.RESHAPE: """
        flatten unflatten view view_as reshape reshape_as transpose t permute movedim moveaxis swapaxes swapdims
        contiguous clone chunk split tensor_split unbind unsqueeze squeeze expand expand_as repeat tile
        repeat_interleave roll rot90 flip gather scatter scatter_add index_select index_copy index_add take narrow
        select slice getitem pad pixel_shuffle pixel_unshuffle channel_shuffle fold unfold detach broadcast_to
        rearrange setitem fill_part update_part index_put constant_pad1d constant_pad2d zero_pad1d zero_pad2d
        reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d circular_pad1d circular_pad2d new_zeros
        zeros_like getattr get_relative_position_bias patch_merging_pad""",
}
KIND_OF_OP = {op: kind for kind, ops in _OPS.items() for op in ops.split()}
# What autocast runs in fp32, by the names under which Python calls it: on a GPU most reductions, exponentials and
# normalisations, on a CPU volumes, padding that mirrors or repeats, and linear algebra. First torch's own lists without
# losses and without what gives complex numbers (aten/src/ATen/autocast_mode.h, AT_FORALL_FP32,
# AT_FORALL_FP32_SET_OPT_DTYPE and `norm`; autocast_mode.cpp, AutocastCPU), then what is made of these operators.
# BatchNorm and instance normalisation run in the type of their input on both.
_FP32_ON_GPU = """
    acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow softplus
    layer_norm native_layer_norm rms_norm group_norm norm frobenius_norm nuclear_norm cosine_similarity
    dist pdist cdist renorm logsumexp prod softmax log_softmax cumprod cumsum sum linalg_vector_norm linalg_matrix_norm
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d
    upsample_bicubic2d _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
    _upsample_bilinear2d_aa _upsample_bicubic2d_aa

    __pow__ __rpow__ __rdiv__ softmin gumbel_softmax normalize local_response_norm pairwise_distance vector_norm
    matrix_norm linalg_norm lp_pool1d lp_pool2d lp_pool3d interpolate upsample upsample_nearest upsample_bilinear
"""
AUTOCAST_FP32_GPU = frozenset(_FP32_ON_GPU.split())
_FP32_ON_CPU = """
    avg_pool3d max_pool3d adaptive_avg_pool3d adaptive_max_pool3d fractional_max_pool2d fractional_max_pool3d
    max_unpool2d max_unpool3d reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d replication_pad3d
    grid_sampler grid_sampler_2d grid_sampler_3d cdist prod trace quantile nanquantile fake_quantize_per_tensor_affine
    cholesky cholesky_inverse cholesky_solve inverse pinverse lu_solve orgqr ormqr geqrf qr svd triangular_solve
    linalg_cond linalg_matrix_rank linalg_solve linalg_cholesky linalg_cholesky_ex linalg_svdvals linalg_svd
    linalg_eigvalsh linalg_eigh linalg_inv linalg_inv_ex linalg_householder_product linalg_tensorinv linalg_tensorsolve
    linalg_qr linalg_lstsq

    grid_sample lp_pool3d local_response_norm
"""
AUTOCAST_FP32_CPU = frozenset(_FP32_ON_CPU.split())
TORCH_LIBRARIES = "aten", "prims"  # under these names torch registers its own operators
# Spellings of one operator: the left one becomes the right one.
_SPELLING = {
    "max_pool2d_with_indices": "max_pool2d",
    "grid_sampler": "grid_sample",
    "truediv": "div",
    "rtruediv": "rdiv",
    "true_divide": "div",
    "divide": "div",
    "multiply": "mul",
    "subtract": "sub",
    "concat": "cat",
    "concatenate": "cat",
    "multi_head_attention": "multihead_attention",
    "re_lu": "relu",
    "re_lu6": "relu6",
    "leaky_re_lu": "leaky_relu",
    "p_re_lu": "prelu",
    "r_re_lu": "rrelu",
    "si_lu": "silu",
    "log_sigmoid": "logsigmoid",
    "softmax2d": "softmax",
    "cross_map_lrn2d": "local_response_norm",
    "split_with_sizes": "split",
    "unsafe_split": "split",
    "unsafe_split_with_sizes": "split",
    "unsafe_chunk": "chunk",
    "hsplit": "tensor_split",
    "vsplit": "tensor_split",
    "dsplit": "tensor_split",
    "upsampling_nearest2d": "upsample",
    "upsampling_bilinear2d": "upsample",
}


def usual_name(op: str) -> str:
    """The one spelling that ptsim uses of an operator's name in lower case."""
    return _SPELLING.get(op, op)


def ungated(name: str, dense: Collection[str]) -> str:
    """What the layer called `name` is called in the network before pruning, whose layers are called `dense`."""
    owner, _, part = name.rpartition(".")
    return owner if name not in dense and part in _GATED and owner in dense else name


def is_gate(name: str) -> bool:
    """Whether that is what channel gating calls a gather or scatter beside a layer."""
    owner, _, part = name.rpartition(".")
    return bool(owner) and part in _GATES


def plain_name(name: str) -> str:
    """What a function, a method or an operator of Python does: `add_`, `__add__`, `iadd` and torch.add are "add"."""
    op = usual_name(name.lower().strip("_"))
    in_place = op not in KIND_OF_OP and op[:1] == "i" and usual_name(op[1:]) in KIND_OF_OP
    return usual_name(op[1:]) if in_place else op


def registered_by(function: object) -> str | None:
    """The library that has registered an operator with torch: "aten", "torchvision", "mine"; None of a function."""
    home = str(getattr(function, "__module__", "")).split(".")
    return home[2] if home[:2] == ["torch", "_ops"] and len(home) > 2 else None


def hands_on(op: str, operand: int) -> bool:
    """Whether a sum's or a difference's operand gets the gradient of the result itself: a subtrahend gets its negative.

    A scaled one gets its multiple.

    Beside a number or a parameter the other operand counts as the first: `1 - x` is `rsub`, `x - 1` is `sub`.
    Source: torch's tools/autograd/derivatives.yaml, `add`, `sub` and `rsub`.
    """
    return op in SUMS or (op in DIFFERENCES | SCALED_SUMS and operand == (1 if op == "rsub" else 0))


def is_transposed(op: str) -> bool:
    """Whether a convolution is a transposed one: its filters are laid on the input, and its weight begins with that."""
    return "transpose" in op


def num_taps(layer: Layer) -> int:
    """Weights of a convolution's filter on one channel. Of three axes the MACs tell: older traces name no depth."""
    if layer.spatial_axes < 3:
        return math.prod(layer.kernel_size)
    folded, image = layer.unfolded(layer.input_shapes[0] if is_transposed(layer.op) else layer.output_shape)
    filters = folded * math.prod(image[1:]) * layer.out_channels * layer.in_channels // layer.groups
    return layer.forward_macs // max(filters, 1)


def second_features(op: str, inputs: Sequence[Sequence[int]]) -> int:
    """Features of a bilinear layer's second input, for each of which it has a matrix; 1 of any other layer.

    It has one input where both are the same.
    """
    second = inputs[:2][-1] if op == BILINEAR and inputs else ()
    return second[-1] if second else 1


def constant_axis(layer: Layer) -> int:
    """The channels' axis in the output of a branch's constant: (C, H, W) of each image is 0, (1, C, 1, 1) for all 1."""
    return len(layer.output_shape) - len(layer.input_shapes[0])
