"""Every YAML file of the repository parses and instantiates; every small run is trained for a few batches."""

import json
from pathlib import Path
from pydoc_data.topics import topics
from shutil import copy

import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch_geometric.nn.models import GIN, GraphSAGE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lit_distill.cli import main
from lit_distill.core.networks import instantiate
from lit_distill.experiment.export import save_student
from lit_distill.experiment.launch import DistillCLI
from lit_distill.experiment.methods import find_methods
from lit_distill.experiment.recipe import read_recipe
from lit_distill.graph import GraphNetwork
from lit_distill.image.models import ConvNet, LeNet, ResNetCIFAR
from lit_distill.llm.small_tokenizer import small_tokenizer

ROOT = Path(__file__).parents[1]
NODES = {"glnn", "glnn_small", "nodes_small"}  # nodes of one graph are the samples
DOMAINS = ("image", "graph", "dataset", "llm", "diffusion")
MADE_WITHIN = ("mend", "mend_small")  # the method builds its student around the network that is given
SMOLLM2 = "models/smollm2"  # the teacher of small language runs
TOKENIZER = "models/tokenizer1k"  # and that of students with another tokenizer
# tests/diffusion/test_prompts.py trains these on tiny pipelines of diffusers.
TEXT = {"snoopi", "snoopi_sd15", "swiftbrush", "dmd2_sd15", "dmd2_sdxl", "dmd2_sd3", "nitrofusion_sdxl"}
TEXT |= {"decoupled_dmd_lumina", "decoupled_dmd_sdxl", "phased_dmd_wan"}
METHODS = sorted(
    path for domain in DOMAINS for path in (ROOT / "configs" / domain).glob("*.yaml") if path.stem not in TEXT
)
RECIPES = sorted((ROOT / "configs/recipes").glob("*.yaml"))
SMALL = [path for path in METHODS if path.stem.endswith("_small")]
CPU = ["-c", str(ROOT / "configs/trainer/cpu.yaml")]


def ids(path):
    return path.stem


@pytest.fixture(scope="session")
def teachers(tmp_path_factory):
    """Folders of untrained teachers, as the runs that the files refer to would leave them."""
    folder = tmp_path_factory.mktemp("teachers")
    small = {"num_classes": 10, "widths": [16, 32], "hidden": 160}
    large = {"num_classes": 100, "depth": 56, "shortcut": "B"}
    path = "lit_distill.image.models"
    save_student(
        LeNet(**small).state_dict(), {"class_path": f"{path}.LeNet", "init_args": small}, folder / "small/student"
    )
    save_student(
        ResNetCIFAR(**large).state_dict(),
        {"class_path": f"{path}.ResNetCIFAR", "init_args": large},
        folder / "large/student",
    )
    gin = {"in_channels": 64, "hidden_channels": 64, "num_layers": 1}
    gnn = {"class_path": "torch_geometric.nn.models.GIN", "init_args": gin}
    network = GraphNetwork(GIN(**gin), [10], 3)
    spec = {"gnn": gnn, "node_values": [10], "num_classes": 3}
    save_student(
        network.state_dict(),
        {"class_path": "lit_distill.graph.GraphNetwork", "init_args": spec},
        folder / "graph/student",
    )
    for name, channels in (("digits", 1), ("colors", 3)):  # with batch normalization, and for images of any size
        spec = {"num_classes": 10, "widths": [8, 16], "in_channels": channels}
        save_student(
            ConvNet(**spec).state_dict(),
            {"class_path": f"{path}.ConvNet", "init_args": spec},
            folder / name / "student",
        )
    sage = {"in_channels": 64, "hidden_channels": 8, "num_layers": 2, "out_channels": 10}
    spec = {"class_path": "torch_geometric.nn.models.GraphSAGE", "init_args": sage}
    save_student(GraphSAGE(**sage).state_dict(), spec, folder / "nodes/student")
    save_language_model(folder / "language")
    small_tokenizer(folder / "tokenizer1k")
    for name, size, hidden in (("judge", 8, 32), ("judge16", 16, 64), ("judge28", 28, 64)):
        judge = {"num_classes": 10, "widths": [16, 32], "hidden": hidden, "image_size": size}
        spec = {"class_path": f"{path}.LeNet", "init_args": judge}
        save_student(LeNet(**judge).state_dict(), spec, folder / name / "student")
    unet = {"image_size": 16, "widths": [8, 16]}
    network = {"class_path": "lit_distill.diffusion.small_unet", "init_args": unet}
    save_denoiser(folder / "unet16/student", network=network, data_std=0.53, time_input="saturating")
    save_denoiser(folder / "denoiser/student")
    for node in ("0001", "0002"):
        (folder / "denoiser/nodes").mkdir(exist_ok=True)
        copy(folder / "denoiser/student/model.safetensors", folder / f"denoiser/nodes/{node}.safetensors")
    save_denoiser(folder / "wide/student", width=128)
    save_denoiser(folder / "flow/student", path="FlowPath", prediction="u", time_input="time")
    return folder


def save_denoiser(folder, width=16, path="EDMPath", **options):
    """A denoiser of 8x8 digits that knows nothing."""
    spec = {
        "class_path": "lit_distill.diffusion.Denoiser",
        "init_args": {
            "network": {"class_path": "lit_distill.diffusion.ResidualMLP", "init_args": {"width": width}},
            "path": {"class_path": f"lit_distill.diffusion.{path}"},
            "num_classes": 10,
            **options,
        },
    }
    save_student(instantiate(spec).state_dict(), spec, folder)


def save_language_model(folder):
    """A Llama of two layers and a tokenizer of 400 tokens, in the layout of transformers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(list(topics.values())[:5], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    sizes = {"hidden_size": 144, "intermediate_size": 96, "num_hidden_layers": 8, "num_attention_heads": 9}
    config = LlamaConfig(**sizes, num_key_value_heads=3, vocab_size=400, max_position_embeddings=512, pad_token_id=0)
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="session")
def experts(tmp_path_factory):
    """The run of one expert on digits."""
    root = tmp_path_factory.mktemp("experts")
    config = ["-c", str(ROOT / "configs/dataset/experts_small.yaml"), "--trainer.max_epochs=20"]
    config += [f"--run.root={root}", "--run.name=x", "--trainer.enable_progress_bar=false"]
    assert main(["fit", *CPU, *config]) == 0
    return root / "default/x"


def weights_for(path):
    """The untrained teacher that serves a file."""
    small = path.stem.endswith("_small")
    if path.parent.name == "llm":
        return "language"
    if path.parent.name == "dataset":
        return "digits" if small else "colors"
    if path.parent.name == "diffusion":
        if "mnist" in path.stem:
            return "unet28" if "mnist28" in path.stem else "unet16"
        return {"mdt_dist": "flow", "nct": "wide"}.get(path.stem.removesuffix("_small"), "denoiser")
    if path.parent.name == "graph":
        return "nodes" if path.stem in NODES else "graph"
    return "small" if small else "large"


def with_weights(config, weights):
    """The configuration with other weights for every pretrained network in it."""
    if isinstance(config, list):
        return [with_weights(item, weights) for item in config]
    if config == SMOLLM2:
        return weights
    if config == TOKENIZER:
        return str(Path(weights).parent / "tokenizer1k")
    if not isinstance(config, dict):
        return config
    # In the features of these generators are judged.
    other = str(Path(weights).with_name({"unet16": "judge16", "unet28": "judge28"}.get(Path(weights).name, "judge")))
    given = {"weights": other if "/classifier" in str(config.get("weights")) else weights}
    if isinstance(config.get("nodes"), str):  # of a teacher's way down to a generator
        given["nodes"] = f"{weights}/nodes"
    return {key: given[key] if key in given else with_weights(value, weights) for key, value in config.items()}


def words(path, teachers, root):
    if path.parent.name == "graph" and path.stem.endswith("_small"):
        pytest.importorskip("datamol", reason="datamol is not installed (extra 'molecules')")
    config = with_weights(yaml.safe_load(path.read_text()), str(teachers / weights_for(path)))
    file = root / path.name
    file.write_text(yaml.safe_dump(config))
    return ["fit", *CPU, "-c", str(file), f"--run.root={root}", "--run.name=x", "--trainer.enable_progress_bar=false"]


@pytest.mark.parametrize("path", METHODS, ids=ids)
def test_method_config_instantiates(path, teachers, tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr(DistillCLI, "_run_subcommand", lambda cli, _: built.append(cli))
    assert main(words(path, teachers, tmp_path)) == 0
    student = yaml.safe_load(path.read_text())["model"]["init_args"].get("student")
    if student is not None and path.stem not in MADE_WITHIN and not student["class_path"].endswith(".pretrained"):
        assert type(built[0].model.student).__name__ == student["class_path"].rpartition(".")[2]
    assert built[0].datamodule.batch_size > 0


@pytest.mark.parametrize("path", SMALL, ids=ids)
def test_small_config_trains_tests_and_leaves_a_whole_run(path, teachers, tmp_path, request):
    short = ["--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1", "--trainer.limit_train_batches=3"]
    short.append("--trainer.val_check_interval=1.0")  # runs that count in steps validate by them
    if "mnist" in path.stem and not path.stem.startswith("classifier"):  # a UNet on the CPU
        short += ["--model.init_args.evaluation.samples=20", "--model.init_args.evaluation.val_samples=10"]
    if "experts" in yaml.safe_load(path.read_text())["model"]["init_args"]:
        short.append(f"--model.init_args.experts={request.getfixturevalue('experts')}")
    assert main([*words(path, teachers, tmp_path), *short]) == 0
    folder = tmp_path / "default/x"
    summary = json.loads((folder / "summary.json").read_text())
    weights = (folder / "student/model.safetensors").stat().st_size
    if path.stem == "diswot_search_small":
        assert {"val/semantic", "val/relation", "val/params"} <= set(summary["metrics"])
        assert weights > 4 * summary["metrics"]["val/params"]
        return
    if path.stem == "mend_small":
        assert {"test/kl", "test/kl_without"} <= set(summary["metrics"])
    elif path.parent.name == "diffusion" and not path.stem.startswith("classifier"):
        assert {"test/fd", "test/recall", "test/precision", "test/acc", "test/mmd"} <= set(summary["metrics"])
        assert {"test/nfe", "test/images_per_second", "test/nearest_train"} <= set(summary["metrics"])
        assert (folder / summary["panels"]["samples"]["file"]).is_file()
    elif path.parent.name == "llm":
        teacher = "test/match" if path.stem in ("gold_small", "uld_small") else "test/kl"
        assert {"test/ce", "test/acc", "test/ece", teacher, "val/ce"} <= set(summary["metrics"])
    else:
        assert {"test/acc", "test/ece", "test/nll", "val/acc"} <= set(summary["metrics"])
    if path.stem in NODES:
        assert {"test/auroc", "test/acc_transductive", "test/acc_inductive"} <= set(summary["metrics"])
    elif path.parent.name == "graph":
        assert {"test/auroc", "test/bytes"} <= set(summary["metrics"])
    assert weights > 4 * summary["networks"]["student"]["params"]
    assert "train/loss" in (folder / "metrics.csv").read_text().splitlines()[0]


@pytest.mark.parametrize("path", RECIPES, ids=ids)
def test_recipe_refers_to_files_and_stages_that_exist(path, tmp_path):
    recipe = read_recipe(str(path))
    jobs = recipe.jobs(tmp_path)
    assert len(jobs) == sum(len(stage.seeds) for stage in recipe.stages)
    assert all("${stage" not in word for job in jobs for word in job.words)


@pytest.mark.parametrize("path", RECIPES, ids=ids)
def test_every_stage_of_a_recipe_parses(path, tmp_path, teachers, monkeypatch):
    monkeypatch.setattr(DistillCLI, "before_instantiate_classes", lambda cli: None)
    monkeypatch.setattr(DistillCLI, "instantiate_classes", lambda cli: None)
    monkeypatch.setattr(DistillCLI, "_run_subcommand", lambda cli, _: None)
    for job in read_recipe(str(path)).jobs(tmp_path, seeds=1):
        assert main(job.words) == 0, job.name


@pytest.mark.parametrize("name", ["cpu", "ddp", "fsdp2", "debug"])
def test_trainer_preset_instantiates(name, teachers, tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr(DistillCLI, "_run_subcommand", lambda cli, _: built.append(cli))
    preset = ["-c", str(ROOT / f"configs/trainer/{name}.yaml"), "--trainer.accelerator=cpu", "--trainer.devices=2"]
    preset = preset[:2] if name in ("cpu", "debug") else preset
    method = words(ROOT / "configs/image/kd_small.yaml", teachers, tmp_path)
    assert main([*method, *preset]) == 0
    assert built[0].trainer.num_devices == (1 if name in ("cpu", "debug") else 2)


def test_gpu_preset_says_what_it_needs(teachers, tmp_path, capsys):
    method = words(ROOT / "configs/image/kd_small.yaml", teachers, tmp_path)
    import torch

    if torch.cuda.is_available():
        pytest.skip("a GPU is there; the preset is right")
    assert main([*method, "-c", str(ROOT / "configs/trainer/gpu.yaml")]) in (1, 2)
    assert "gpu" in capsys.readouterr().err.lower()


@pytest.mark.parametrize("name", ["csv", "wandb"])
def test_logger_preset_instantiates_with_the_run_folder_first(name, teachers, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    built = []
    monkeypatch.setattr(DistillCLI, "_run_subcommand", lambda cli, _: built.append(cli))
    method = words(ROOT / "configs/image/kd_small.yaml", teachers, tmp_path)
    assert main([*method, "-c", str(ROOT / f"configs/logger/{name}.yaml")]) == 0
    trainer = built[0].trainer
    assert Path(trainer.log_dir) == tmp_path / "default/x"
    assert len(trainer.loggers) == (1 if name == "csv" else 2)


def test_every_method_has_a_published_and_a_small_config():
    for method in find_methods():
        stems = {Path(path).stem for path in method["configs"]}
        assert any(stem.endswith("_small") for stem in stems), method["name"]
        assert any(not stem.endswith("_small") for stem in stems), method["name"]
