"""A Triton driver without a device: kernels are compiled for sm_90, and their launches are noted."""

from contextlib import contextmanager

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

PROPERTIES = {
    "max_shared_mem": 232448,
    "multiprocessor_count": 132,
    "warpSize": 32,
    "max_num_regs": 65536,
}


class FakeUtils:
    """Loads no binary."""

    def load_binary(self, *_):
        return 1, 1, 32, 0, 1024

    def get_device_properties(self, _):
        return PROPERTIES


class FakeDriver(DriverBase):
    """`launches` holds (kernel, grid, arguments) of every launch."""

    def __init__(self):
        self.utils, self.launches = FakeUtils(), []

    @staticmethod
    def is_active():
        return True

    def launcher_cls(self, source, metadata):
        def launch(x, y, z, stream, function, packed, info, enter, leave, *arguments):
            self.launches.append((metadata.name, (x, y, z), arguments))

        return launch

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def map_python_to_cpp_type(self, name):
        return name

    def get_benchmarker(self):
        return None

    def get_device_interface(self):
        return torch.cuda


@contextmanager
def fake_gpu():
    """Within it Triton compiles for sm_90 and starts nothing; gives the driver."""
    fake = FakeDriver()
    driver.set_active(fake)
    try:
        yield fake
    finally:
        driver.set_active(None)  # chosen again by the next use
