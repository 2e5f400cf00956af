"""Where the ranks of a training meet: on the interface that Ray itself is reached by, whichever others a node has."""

import os
from typing import Any

import psutil
import ray.util
from ray.train.torch.config import TorchConfig, _TorchBackend


class OnRaysNetwork(TorchConfig):
    @property
    def backend_cls(self) -> type["_Backend"]:
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(name_interface)
        super().on_start(worker_group, backend_config)


def name_interface() -> None:
    """Else gloo listens where the host's own name leads, which is 127.0.1.1 on many a machine."""
    mine = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if mine in [each.address for each in addresses]:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
