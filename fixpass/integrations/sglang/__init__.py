"""SGLang: hooks into its serving and diffusion sides, installed by its plugin system.

`plugin` is the entry point of the serving side; the diffusion side has its own in `diffusion`.
"""


def plugin() -> None:
    """Switch fixpass on in a process of SGLang's serving side, where `FIXPASS=1` asks for it."""
    # fixpass.modules imports this package for one of its modules: the hooks are not needed there.
    from fixpass.integrations.sglang import serving

    serving.plugin()
