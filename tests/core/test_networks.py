import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lit_distill.core.errors import RunError, UsageError
from lit_distill.core.networks import (
    count_parameters,
    freeze,
    import_class,
    instantiate,
    load_weights,
    pretrained,
    read_weights,
)


@pytest.fixture
def weights():
    return {"weight": torch.tensor([[1.0, 2.0]]), "bias": torch.tensor([3.0])}


def loaded(network):
    return network.weight.tolist() == [[1.0, 2.0]] and network.bias.tolist() == [3.0]


def test_freeze_stops_gradients_and_batch_statistics():
    network = freeze(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not network[1].training


def test_parameters_are_counted_once_each():
    assert count_parameters(nn.Linear(3, 4)) == 16
    assert count_parameters(freeze(nn.Conv2d(2, 5, 3))) == 95
    assert count_parameters(None) == 0


def test_a_run_folder_and_its_student_folder_build_the_network_they_hold(tmp_path, weights):
    folder = tmp_path / "run" / "student"
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors")
    spec = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 2, "out_features": 1}}
    (folder / "config.json").write_text(json.dumps(spec))
    assert loaded(pretrained(str(folder)))
    assert loaded(pretrained(str(tmp_path / "run")))


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"state_dict": w, "epoch": 3}, lambda w: {"model": w}])
def test_torch_files_of_the_usual_forms_are_read(tmp_path, weights, wrap):
    torch.save(wrap({f"module.{key}": value for key, value in weights.items()}), tmp_path / "w.pth")
    assert loaded(pretrained(str(tmp_path / "w.pth"), nn.Linear(2, 1)))


def test_of_a_lightning_checkpoint_the_student_is_taken(tmp_path, weights):
    state = {f"student.{key}": value for key, value in weights.items()} | {"losses.hint.weight": torch.ones(3)}
    torch.save({"pytorch-lightning_version": "2.6.0", "state_dict": state}, tmp_path / "last.ckpt")
    assert loaded(pretrained(str(tmp_path / "last.ckpt"), nn.Linear(2, 1)))


def test_weights_of_another_network_are_refused_by_the_first_difference(tmp_path, weights):
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match=r"weight has shape \(1, 2\), the network wants \(1, 3\)"):
        pretrained(str(tmp_path / "w.safetensors"), nn.Linear(3, 1))
    with pytest.raises(UsageError, match="bias is not in the network"):
        pretrained(str(tmp_path / "w.safetensors"), nn.Linear(2, 1, bias=False))
    with pytest.raises(UsageError, match=r"0.weight is missing \(and 3 more\)"):
        pretrained(str(tmp_path / "w.safetensors"), nn.Sequential(nn.Linear(2, 1)))


def test_what_is_missing_is_said(tmp_path, weights):
    with pytest.raises(UsageError, match=r"nowhere\.pt does not exist"):
        pretrained(str(tmp_path / "nowhere.pt"))
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="add `network:`"):
        pretrained(str(tmp_path / "model.safetensors"))
    with pytest.raises(UsageError, match=r"has no config\.json"):
        pretrained(str(tmp_path))


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("keep", [0, 60])
def test_truncated_files_are_run_errors(tmp_path, weights, name, keep):
    path = tmp_path / name
    if name.endswith(".pt"):
        torch.save(weights, path)
    else:
        save_file(weights, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RunError, match="cannot be read"):
        read_weights(path)


def test_a_file_with_code_is_not_run_and_one_without_weights_is_refused(tmp_path):
    torch.save(nn.Linear(2, 1), tmp_path / "pickled.pt")
    with pytest.raises(RunError, match="cannot be read"):
        read_weights(tmp_path / "pickled.pt")
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    with pytest.raises(RunError, match="holds a Tensor"):
        read_weights(tmp_path / "tensor.pt")


def test_descriptions_nest():
    leaf = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 2}, "dict_kwargs": {"out_features": 5}}
    made = instantiate({"class_path": "torch.nn.ModuleList", "init_args": {"modules": [leaf, leaf]}})
    assert [layer.out_features for layer in made] == [5, 5]
    assert made[0] is not made[1]


@pytest.mark.parametrize("path", ["torch.nn.Linnear", "no_such_package.Net", "Net"])
def test_a_class_path_that_leads_nowhere_is_named(path):
    with pytest.raises(UsageError, match=f"'{path}' cannot be imported"):
        import_class(path)


def test_weights_from_before_batchnorm_counted_batches_are_taken():
    source, network = nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(3))
    source.running_mean.fill_(2.0)
    state = {f"0.{key}": value for key, value in source.state_dict().items() if key != "num_batches_tracked"}
    load_weights(network, state, origin="old")
    assert network[0].running_mean.tolist() == [2.0] * 3
