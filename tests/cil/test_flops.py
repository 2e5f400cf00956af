import torch
from torch import nn
from torch.nn import functional as F

from cil.flops import PEAKS, of_next_call, peak_of


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.convolution = nn.Linear(32, 32), nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, tokens, picture):
        heads = self.linear(tokens).unflatten(-1, (4, 8)).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads), self.convolution(picture)


LINEAR, ATTENTION, CONVOLUTION = 2 * 10 * 32 * 32, 2 * 2 * (2 * 4) * 5 * 5 * 8, 2 * 2 * (7 * 9) * 8 * (3 * 9)


def test_a_multiplication_and_its_addition_are_two_of_one_call_and_of_nothing_beside():
    net, tokens, picture = Net(), torch.randn(2, 5, 32), torch.randn(2, 3, 7, 9)
    flops = of_next_call(net)
    torch.randn(9, 9) @ torch.randn(9, 9)
    assert flops() == 0
    for _ in range(2):
        net(tokens, picture)[1].sum().backward()
        assert flops() == LINEAR + ATTENTION + CONVOLUTION


def test_a_gpu_has_the_peak_of_its_kind_and_a_cpu_has_none(monkeypatch):
    assert peak_of(torch.device("cpu")) is None
    known = {"H100 PCIe": 756e12, "H100 80GB HBM3": 989e12, "L40S": 362e12, "L40": 181e12, "A10G": 70e12}
    for name, peak in {**known, "A100-SXM4-80GB": 312e12, "RTX A1000": None}.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_of(torch.device("cuda", 0)) == peak
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Something new")
    assert peak_of(torch.device("cuda", 0)) is None
    assert list(PEAKS).index("H100 PCIe") < list(PEAKS).index("H100")
