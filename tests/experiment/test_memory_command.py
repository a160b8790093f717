"""`lit-distill memory`: networks of a configuration, by what shapes say."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lit_distill.cli import main

MLP = "lit_distill.image.models.MLP"
CONFIG = f"""\
trainer: {{accelerator: cpu, devices: 1}}
model:
  class_path: lit_distill.image.KD
  init_args:
    student: {{class_path: {MLP}, init_args: {{in_features: 1023, num_classes: 1024, hidden: [1024]}}}}
    teacher:
      class_path: lit_distill.core.pretrained
      init_args:
        weights: nowhere
        network: {{class_path: {MLP}, init_args: {{in_features: 1023, num_classes: 1024, hidden: [4096]}}}}
    optimizer: {{class_path: torch.optim.SGD, init_args: {{lr: 0.1, momentum: 0.9}}}}
data:
  class_path: lit_distill.image.ImageFolderDataModule
  init_args: {{root: nowhere, image_size: 32, batch_size: 8}}
"""


@pytest.fixture
def shown(tmp_path, monkeypatch, capsys):
    """Runs the command; returns rows of numbers by network and devices."""

    def run(*words, file="plan.yaml"):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "plan.yaml").write_text(CONFIG)
        assert main(["memory", "-c", file, *words]) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        return {(line[0], int(line[1])): line[2:] for line in lines if len(line) == 8 and line[1].isdigit()}

    return run


def test_networks_of_a_configuration(shown):
    rows = shown("--devices", "1", "2")
    assert set(rows) == {(name, count) for name in ("student", "teacher", "all") for count in (1, 2)}
    # 1023 x 1024 + 1024 and 1024 x 1024 + 1024 numbers of 4 bytes: 8 MiB and 4 KiB; gradients and momentum as much.
    assert rows["student", 1] == ["0.01", "0.01", "0.01", "0.00", "0.00", "0.02"]
    # Four times that, at rest.
    assert rows["teacher", 1] == ["0.03", "0.00", "0.00", "0.00", "0.00", "0.03"]
    assert rows["student", 2][:3] == ["0.0039", "0.0039", "0.0039"]


def test_optimizer_and_precision_count(shown):
    adam = ["--model.optimizer", "torch.optim.AdamW", "--devices", "1"]
    assert shown(*adam)["student", 1][2] == "0.02"
    assert shown(*adam, "--trainer.precision", "bf16-true")["student", 1][:3] == ["0.0039", "0.0039", "0.01"]
    mixed = shown(*adam, "--trainer.precision", "bf16-mixed")
    assert mixed["student", 1][4] == "0.0039"
    assert mixed["teacher", 1][4] == "0.00"


def test_language_models_by_folder_without_their_weights(shown, tmp_path):
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8}
    config = LlamaConfig(**sizes, num_key_value_heads=8, vocab_size=4096, tie_word_embeddings=True)
    config.save_pretrained(tmp_path / "model")  # and no weights
    with torch.device("meta"):
        count = sum(weight.numel() for weight in LlamaForCausalLM(config).parameters())
    model = "{class_path: lit_distill.llm.CausalLM, init_args: {name: model, dtype: bfloat16}}"
    (tmp_path / "language.yaml").write_text(
        f"model: {{class_path: lit_distill.llm.ForwardKL, init_args: {{student: {model}, teacher: {model}}}}}\n"
        "data: {class_path: lit_distill.llm.TextDataModule, init_args: {tokenizer: model}}\n"
    )
    rows = shown("--devices", "1", file="language.yaml")
    assert rows["teacher", 1][0] == f"{2 * count / 2**30:.2f}"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["-c", "plan.yaml", "--devices", "0"], "--devices: 0 devices; give at least 1"),
        (["-c", "plan.yaml", "--model.student.hidden=[0.5]"], "hidden"),
        (["--devices", "2"], "model missing"),
    ],
)
def test_mistakes_are_told_in_one_line(words, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.yaml").write_text(CONFIG)
    assert main(["memory", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
