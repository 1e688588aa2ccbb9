"""The operators in plain NumPy and float64, for short inputs."""

import numpy as np


def visible(mask, n, m):
    """The visible keys [N, M] of a mask that is the same for all batch entries."""
    table = np.zeros((n, m), bool)
    for i in range(n):
        table[i, slice(*mask.visible(0, i, m))] = True
    return table


def energies(q, k, beta, table, prior=None, dot=False):
    """Selection energies [B, Hq, N, M], +inf for invisible keys."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    k = np.repeat(k, q.shape[1] // k.shape[1], 1)
    beta = np.broadcast_to(beta, q.shape[1])[None, :, None, None]
    if dot:
        energy = -beta * (q @ k.swapaxes(-1, -2))
    else:
        energy = beta * np.square(q[:, :, :, None] - k[:, :, None]).sum(-1)
    if prior is not None:
        prior = np.repeat(prior, q.shape[1] // prior.shape[1], 1)
        energy = energy - prior[:, :, None]
    return np.where(table, energy, np.inf)


def candidates(energy, count):
    """Indices and energies of the least `count` energies."""
    order = np.argsort(energy, -1, kind="stable")[..., :count]
    least = np.take_along_axis(energy, order, -1)
    return np.where(np.isfinite(least), order, -1), least


def running_average(decay, write, v):
    """The averages by the recurrence itself."""
    v = np.repeat(v, decay.shape[1] // v.shape[1], 1).astype(np.float64)
    keep, weight = 1 / (1 + np.exp(-decay.astype(np.float64))), np.exp(write.astype(np.float64))
    m, top, bottom = np.zeros_like(v), np.zeros_like(v[:, :, 0]), np.zeros(decay.shape[:2])
    for t in range(v.shape[2]):
        top = keep[:, :, t, None] * top + weight[:, :, t, None] * v[:, :, t]
        bottom = keep[:, :, t] * bottom + weight[:, :, t]
        m[:, :, t] = top / bottom[..., None]
    return m


def differences(function, array, step=1e-6):
    """The gradient of a scalar function by central differences."""
    gradient = np.zeros_like(array)
    for at in np.ndindex(array.shape):
        before = array[at]
        array[at] = before + step
        up = function()
        array[at] = before - step
        down = function()
        array[at] = before
        gradient[at] = (up - down) / (2 * step)
    return gradient
