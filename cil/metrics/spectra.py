"""Power spectra of videos: an over-smooth video lacks what is fine, a frozen one lacks what changes.

    spectra = Moments.of(torch.stack([spatial_spectrum(frames) for frames in part]))    # merges, as moments do
    print(spectral_distance(spectra.mean, real.mean))                                   # dB

Power is the mean square of the coefficients of an orthonormal cosine transform, in grey levels squared: noise of
deviation s has s^2 at all frequencies. It is that of the picture and its mirror image, so unlike Fourier's it has no
step at the border, which in photographs drowns what is fine.
"""

import torch
from torch import Tensor

BINS = 16  # of 1/32 cycles a pixel, up to half a cycle
SMALLEST = 32  # pixels of the longer side: with less the first bin is empty
ROUNDING = 1 / 12  # the power of what rounding to whole grey levels adds


def spatial_spectrum(frames: Tensor) -> Tensor:
    """float64 [BINS] of uint8 frames [T, H, W, 3]: over the radial frequency, a mean over frames; without brightness.

    The k-th is of frequencies from k / (2 BINS) to (k + 1) / (2 BINS) cycles a pixel.
    """
    from scipy.fft import dctn

    grey = _grey(frames)
    if max(grey.shape[1:]) < SMALLEST:
        raise ValueError(f"frames {list(frames.shape)}: a spatial spectrum needs {SMALLEST} pixels on the longer side")
    power = sum(torch.from_numpy(dctn(picture.numpy(), norm="ortho")).square_() for picture in grey) / len(grey)
    assert isinstance(power, Tensor)
    # The k-th cosine of n pixels has k half waves over them.
    y, x = (torch.arange(n, dtype=torch.float64) / (2 * n) for n in power.shape)
    radius = (y[:, None] ** 2 + x**2).sqrt()
    bins = (radius * 2 * BINS + 1e-9).long()
    counted = bins < BINS
    counted[0, 0] = False
    total = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins[counted], power[counted])
    return total / bins[counted].bincount(minlength=BINS)


def temporal_spectrum(frames: Tensor) -> Tensor:
    """float64 [T - 1] of uint8 frames [T, H, W, 3]: of what changes at a pixel, a mean over pixels.

    The k-th, from 1 on, is of k / (2 T) cycles a frame. So sets are compared that have as many frames.
    """
    from scipy.fft import dct

    if len(frames) < 2:
        raise ValueError(f"frames {list(frames.shape)}: a temporal spectrum needs 2")
    return (
        torch.from_numpy(dct(_grey(frames).numpy(), axis=0, norm="ortho", overwrite_x=True)).square_().mean((1, 2))[1:]
    )


def spectral_distance(ours: Tensor, real: Tensor) -> float:
    """Log-spectral distance of two mean spectra, in dB: the root of the mean square over frequencies.

    What is weaker than the rounding of pixels is taken to be as strong: a frozen video has no power to take a log of.
    """
    if ours.shape != real.shape:
        raise ValueError(f"spectra of {list(ours.shape)} and {list(real.shape)}: of one kind, of as many frames")
    a, b = (10 * spectrum.double().clamp(min=ROUNDING).log10() for spectrum in (ours, real))
    return float((a - b).square().mean().sqrt())


def _grey(frames: Tensor) -> Tensor:
    """float64 [T, H, W], 0 .. 255: a frame at a time, as three colours in float64 take eight times what they did."""
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    grey = torch.empty(frames.shape[:3], dtype=torch.float64)
    for k, frame in enumerate(frames):
        grey[k] = frame.double() @ weights
    return grey
