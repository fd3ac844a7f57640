"""Size of the activations that a compiled training step keeps for the backward pass."""

from bimedix_jax.plan.hlo import Computation, Instruction, Program, trip_count, unwrapped


def saved_bytes(program: Program, layers: int) -> int:
    """Bytes of the arrays, one entry per layer, that the forward pass's loop over layers fills.

    They live until the backward pass has used them. With rematerialised layers they are the layers' inputs.
    """
    found = 0
    for computation in program.computations.values():
        for loop in computation.instructions.values():
            if loop.opcode == "while" and is_forward(loop) and trip_count(program, computation, loop) == layers:
                found = max(found, stacked_bytes(program, program.callee(loop, "body"), layers))
    return found


def is_forward(loop: Instruction) -> bool:
    """Whether a loop belongs to the forward pass of a gradient. JAX writes both into the operation's name."""
    return "jvp(" in loop.op_name and "transpose(" not in loop.op_name


def stacked_bytes(program: Program, body: Computation, layers: int) -> int:
    carried = unwrapped(body, body.root)
    total = 0
    for name in dict.fromkeys(carried.operands):
        element = unwrapped(body, body.instructions[name])
        if len(element.shapes) == 1 and element.shapes[0].dims[:1] == (layers,) and is_update(program, body, element):
            total += element.shapes[0].nbytes
    return total


def is_update(program: Program, computation: Computation, value: Instruction) -> bool:
    """Whether the value is an array with a part replaced, possibly inside a fusion."""
    value = unwrapped(computation, value)
    if value.opcode == "dynamic-update-slice":
        return True
    if value.opcode == "fusion":
        inside = program.callee(value)
        return is_update(program, inside, inside.root)
    if value.opcode == "get-tuple-element" and computation.operand(value, 0).opcode == "fusion":
        inside = program.callee(computation.operand(value, 0))
        return is_update(program, inside, inside.operand(inside.root, int(value.attribute("index") or 0)))
    return False
