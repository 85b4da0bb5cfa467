"""Probes that learn by gradient descent: what they learn, and what they leave alone."""

import pytest
import torch
from torch import nn

from ddae_hf.experiments.online_probes import OnlineProbes

from .test_logistic_regression import make_features


@pytest.mark.parametrize("batch_norm", [False, True])
def test_online_probes_learn_apart_and_give_their_weights(batch_norm):
    torch.manual_seed(0)
    features, labels = make_features()
    features = torch.from_numpy(features / features.std(0))
    inputs, y = {"a.0": features, "b": features[:, :5]}, torch.from_numpy(labels)
    probes = OnlineProbes({"a.0": 12, "b": 5}, 4, batch_norm)
    optimizer = torch.optim.Adam(probes.parameters(), lr=0.05)
    for _ in range(300):
        loss = sum(nn.functional.cross_entropy(logits, y) for logits in probes(inputs).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    logits = probes.eval()(inputs)
    for layer, values in inputs.items():
        weight, bias = probes.linear(layer)
        torch.testing.assert_close(values @ weight.T + bias, logits[layer], rtol=1e-3, atol=1e-3)
    assert (logits["a.0"].argmax(1) == y).float().mean() > (logits["b"].argmax(1) == y).float().mean() > 0.3
