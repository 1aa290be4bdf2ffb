"""A stand-in for SGLang's compiled kernels on a machine that has none: any call raises."""


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args, **kwargs):
        raise RuntimeError(f"sgl_kernel.{name} is not there on this machine")

    missing.__name__ = name
    return missing
