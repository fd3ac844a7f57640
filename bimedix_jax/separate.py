"""tmp"""


def suits(model, rows):
    return False


def parameters(model): ...


def cache(cache): ...
