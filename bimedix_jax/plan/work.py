"""FLOPs of one instruction of a compiled program.

FLOPs are those of matrix products: `dot`, `convolution` (the TPU compiler turns products into convolutions), products
of cuBLAS, and the grids of our own kernels. All other instructions, such as norms, softmax and dequantisation outside
of kernels, have none; traffic.py counts the bytes that instructions move. `costs/flops.py` counts the useful FLOPs.
"""

import dataclasses
import math
import re

from bimedix_jax.costs.flops import matmul_flops
from bimedix_jax.errors import BimedixError
from bimedix_jax.plan.attention import attention_flops, is_attention, name_of
from bimedix_jax.plan.hlo import Computation, Instruction, Program, Shape, parse_shapes

KERNELS = TRITON, MOSAIC = "__gpu$xla.gpu.triton", "tpu_custom_call"
GRADIENT, UNPACK = "weight_gradient", "unpack"
TILE = re.compile(
    rf"(?P<kernel>grouped_matmul|nf4_matmul|{GRADIENT}|{UNPACK})_(?P<m>\d+)x(?P<n>\d+)x(?P<k>\d+)(__\d+)?"
)
"""Name of a Triton kernel of ours: its operation, its tile, and a number where a program has several."""
ROW_TYPES = ("bf16", "f16", "f32")
OPAQUE_PRODUCTS = re.compile(r"cublas|cudnn|onednn|gemm|conv", re.IGNORECASE)
"""Custom calls of libraries that multiply matrices. XLA uses them only where it can time them on a present device."""
CUBLAS = ("__cublas$gemm", "__cublas$lt$matmul")
"""Those that are counted: XLA may choose them when the GPU is present."""
CONTRACTED = re.compile(r'"lhs_contracting_dimensions":\[((?:"\d+",?)*)\]')
GRID = re.compile(r"grid_x = (\d+) : i32, grid_y = (\d+)")
MOSAIC_FLOPS = re.compile(r'"cost_estimate":\{"flops":"(\d+)"')
WINDOW = re.compile(r"(\w+)=([\w-]+)")


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of one run of an instruction.

    Attributes:
      total: of all tiles, including their padding.
      filled: without the padding of tiles.
      single: the part of `total` with float32 operands.
      kernel: whether a kernel of ours executes them.
      packed: whether that kernel unpacks the weights itself.
    """

    total: float = 0.0
    filled: float = 0.0
    single: float = 0.0
    kernel: bool = False
    packed: bool = False

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(
            self.total + other.total,
            self.filled + other.filled,
            self.single + other.single,
            self.kernel or other.kernel,
            self.packed or other.packed,
        )


def flops_of(program: Program, computation: Computation, instruction: Instruction) -> Flops:
    """FLOPs of one execution, including the instructions inside a fusion.

    Raises:
      BimedixError: it calls a kernel whose FLOPs are unknown.
    """
    if instruction.opcode == "dot":
        return dense(computation, instruction, dot_flops(computation, instruction))
    if instruction.opcode == "convolution":
        return dense(computation, instruction, convolution_flops(computation, instruction))
    if instruction.opcode == "custom-call":
        if (instruction.attribute("custom_call_target") or "").strip('"') in CUBLAS:
            return dense(computation, instruction, cublas_flops(computation, instruction))
        return kernel_call(instruction)
    if instruction.opcode == "fusion":
        inside = program.callee(instruction)
        return sum((flops_of(program, inside, i) for i in inside.instructions.values()), Flops())
    return Flops()


def dense(computation: Computation, instruction: Instruction, flops: float) -> Flops:
    kind = computation.operand(instruction, 0).shapes[0].dtype
    return Flops(flops, flops, flops if kind in ("f32", "f64") else 0.0)


def dot_flops(computation: Computation, instruction: Instruction) -> float:
    left = computation.operand(instruction, 0).shapes[0].dims
    axes = instruction.attribute("lhs_contracting_dims") or ""
    return 2.0 * instruction.shapes[0].size * math.prod(left[int(i)] for i in axes.split(",") if i)


def cublas_flops(computation: Computation, instruction: Instruction) -> float:
    left, axes = computation.operand(instruction, 0).shapes[0].dims, CONTRACTED.search(instruction.attributes)
    if axes is None:
        raise BimedixError(f"The product {instruction.name} names no contracted axes; XLA prints another format.")
    return 2.0 * instruction.shapes[0].size * math.prod(left[int(i)] for i in re.findall(r"\d+", axes[1]))


def convolution_flops(computation: Computation, instruction: Instruction) -> float:
    """FLOPs of a convolution, without the window positions in the padding.

    The TPU compiler turns products with several batch or output axes into convolutions with much padding.
    """
    left, right, out = (
        computation.operand(instruction, 0).shapes[0].dims,
        computation.operand(instruction, 1).shapes[0].dims,
        instruction.shapes[0].dims,
    )
    labels = re.fullmatch(r"(\w+)_(\w+)->(\w+)", instruction.attribute("dim_labels") or "")
    if labels is None:
        raise BimedixError(f"The convolution {instruction.name} has no dim_labels; XLA prints another format.")
    window = dict(WINDOW.findall(instruction.attribute("window") or ""))
    positions = 1
    for axis in sorted(set(labels[1]) - {"b", "f"}):
        place = int(axis)
        operands = ((left, labels[1]), (right, labels[2]), (out, labels[3]))
        size, kernel, outputs = (dims[names.index(axis)] for dims, names in operands)
        positions *= window_positions(size, kernel, outputs, *window_axis(window, place))
    batch, features = out[labels[3].index("b")], out[labels[3].index("f")]
    inputs = right[labels[2].index("i")]
    groups = int(instruction.attribute("batch_group_count") or 1)
    return 2.0 * batch * features * inputs * positions / groups


def window_axis(window: dict[str, str], place: int) -> tuple[int, int, int, int]:
    """(stride, low padding, dilation of the left operand, dilation of the window) of one axis."""

    def value(name: str, default: str) -> str:
        return window[name].split("x")[place] if name in window else default

    low = int(value("pad", "0_0").rpartition("_")[0])
    return int(value("stride", "1")), low, int(value("lhs_dilate", "1")), int(value("rhs_dilate", "1"))


def window_positions(size: int, kernel: int, out: int, stride: int, low: int, spread: int, step: int) -> int:
    """Pairs of an output and a window position that read an element of the left operand, not padding."""
    found = 0
    for k in range(kernel):
        # output o reads position o * stride + k * step - low, which must be a multiple of `spread` inside the operand
        first = k * step - low
        if stride == 1 and spread == 1:
            found += max(0, min(out, size - first) - max(0, -first))
        else:
            places = (o * stride + first for o in range(out))
            found += sum(place % spread == 0 and 0 <= place < size * spread for place in places)
    return found


def kernel_call(instruction: Instruction) -> Flops:
    """FLOPs of a custom call: those of its grid for a kernel of ours, 0 for a call that multiplies nothing."""
    target = instruction.attribute("custom_call_target") or ""
    target = target.strip('"')
    name = name_of(instruction)
    if target in KERNELS and is_attention(name):
        operands = kernel_operands(instruction)
        total, filled = attention_flops(name, operands)
        q = next(shape for shape in operands if shape.dtype in ROW_TYPES)
        single = total if q.dtype == "f32" else 0.0
        return Flops(total, filled, single, kernel=True)
    if target == MOSAIC:
        estimate = MOSAIC_FLOPS.search(instruction.attributes)
        if estimate is None:
            raise BimedixError(f"The kernel {instruction.op_name} states no FLOPs; give it a cost_estimate.")
        total = float(estimate[1])
        filled = min(total, mosaic_filled(instruction)) if total else 0.0
        return Flops(total, filled, kernel=True, packed=is_packed(instruction)) if total else Flops()
    if target == TRITON:
        return triton_call(instruction)
    if OPAQUE_PRODUCTS.search(target):
        raise BimedixError(f"The compiled program calls {target}, whose FLOPs are not counted.")
    return Flops()


def is_packed(instruction: Instruction) -> bool:
    """Whether a kernel's weights are packed NF4."""
    return any(shape.dtype == "u8" for shape in kernel_operands(instruction))


def kernel_operands(instruction: Instruction) -> list[Shape]:
    listed = re.search(r"operand_layout_constraints=\{((?:[^{}]|\{[^{}]*\})*)\}", instruction.attributes)
    return list(parse_shapes(listed[1])) if listed else []


def triton_call(instruction: Instruction) -> Flops:
    part, grid = TILE.search(instruction.op_name), GRID.search(instruction.attributes)
    if part is None or grid is None:
        raise BimedixError(f"The compiled program calls {instruction.op_name}, whose FLOPs are not counted.")
    if part["kernel"] == UNPACK:
        return Flops()
    # the first floating-point operand is x: [rows, contracted columns]; the operands before it are indices
    operands = kernel_operands(instruction)
    x = next(shape for shape in operands if shape.dtype in ("bf16", "f16", "f32"))
    rows, columns = x.dims
    out = instruction.shapes[0].dims
    is_gradient = part["kernel"] == GRADIENT
    tile = (int(part["m"]), int(part["n"]), int(part["k"]))
    total = float(kernel_flops(part["kernel"], tile, (int(grid[1]), int(grid[2])), rows if is_gradient else columns))
    if not is_gradient and operands[0].dims:
        total *= working_tiles(rows, tile[0], operands[0].dims[0]) / operands[0].dims[0]
    filled = 2.0 * rows * columns * out[-1]
    single = total if x.dtype == "f32" else 0.0
    return Flops(total, min(total, filled), single, kernel=True, packed=is_packed(instruction))


def working_tiles(rows: int, height: int, tiles: int) -> float:
    """Tiles of a grouped product that are expected to have rows; the programs of the others exit immediately.

    The grid has a tile for each full height of rows, and one more for each group. The last tile of a group is half full
    on average, so all groups together need rows / height tiles and half a tile for each group; a group has at least
    one. With fewer rows than tiles, as in decoding, each row has a tile of its own.
    """
    groups = max(tiles - -(-rows // height), 0)
    return min(rows, tiles, max(groups, rows / height + groups / 2)) if groups else tiles


def kernel_flops(kernel: str, tile: tuple[int, int, int], grid: tuple[int, ...], contracted: int) -> int:
    """FLOPs of all programs of a Triton kernel. UNPACK multiplies nothing.

    Programs that exit early because their tile has no rows are counted. For GRADIENT, so are the masked rows under the
    worst group sizes.

    Args:
      contracted: columns that the product contracts; for GRADIENT, rows.
    """
    m, n, k = tile
    if kernel == UNPACK:
        return 0
    if kernel == GRADIENT:
        return grid[0] * matmul_flops(m, contracted + grid[1] * (k - 1), n)
    return grid[0] * matmul_flops(m, -(-contracted // k) * k, n)


def mosaic_filled(instruction: Instruction) -> float:
    """FLOPs without padding of a grouped product of mosaic_tpu.py, x [M, K] times [E, K, N], or of its gradient."""
    x = next(shape for shape in kernel_operands(instruction) if len(shape.dims) == 2 and shape.dtype in ("bf16", "f32"))
    out = instruction.shapes[0].dims
    return 2.0 * x.dims[0] * x.dims[1] * out[-1]
