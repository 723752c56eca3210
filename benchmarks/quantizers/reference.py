"""The Gaussian rate-distortion function: the loss of an ideal code on a normal distribution of the same covariance.

It is a reference line, not a lower bound: of all distributions with one covariance, the normal one is the hardest, so a
code that exploits a corpus's clusters can lose less. And no code of single vectors reaches the theorem's value, which
holds for blocks of unbounded length.
"""

import numpy as np
import numpy.typing as npt


def distortion(eigenvalues_D: npt.NDArray[np.floating], bits: float) -> float:
    """Return D(R) by reverse water-filling (Cover and Thomas, Theorem 10.3.3).

    D = sum_i min(theta, lambda_i) with theta such that sum_i max(0, log2(lambda_i / theta) / 2) = bits.

    Args:
        eigenvalues_D: of the covariance, in any order, not negative.
        bits: R, for the whole vector.

    Returns:
        squared error of a vector, summed over its dimensions.
    """
    falling_D = np.sort(eigenvalues_D[eigenvalues_D > 0])[::-1]
    logs_D = np.log2(falling_D)
    # With the k largest active, log2 theta = (sum of their logs - 2 R) / k; k is right when theta lies
    # between the k-th eigenvalue and the next one. That is the first k whose theta covers the rest.
    active_D = np.arange(1, len(falling_D) + 1)
    theta_D = 2.0 ** ((np.cumsum(logs_D) - 2 * bits) / active_D)
    covered_D = theta_D >= np.append(falling_D[1:], 0.0)
    k = int(np.argmax(covered_D))
    return float((k + 1) * theta_D[k] + falling_D[k + 1 :].sum())


def gaussian_reference(training_ND: npt.NDArray[np.float32], bits: float) -> tuple[float, float]:
    """Return the reference of a corpus at a rate: squared error D(R), and the cosine loss 1 - sqrt(1 - D).

    For unit vectors x and the best decoder, xhat = E[x | code]: E<x, xhat> = E|xhat|^2 = 1 - D. If
    all xhat have one length, it is sqrt(1 - D), and the cosine is (1 - D) / sqrt(1 - D).

    Args:
        training_ND: unit vectors, from which the covariance is computed. bits: R.
    """
    covariance_DD = np.cov(training_ND.astype(np.float64), rowvar=False, bias=True)
    d = distortion(np.linalg.eigvalsh(covariance_DD), bits)
    return d, 1.0 - float(np.sqrt(1.0 - d))
