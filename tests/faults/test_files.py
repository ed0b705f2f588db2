"""Files, folders and addresses as people have them: read as meant, or refused in one line that names them."""

import codecs
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ref import evaluate, train
from ref.models import embeddings
from ref.models.hub import locate
from ref.models.load import load
from ref.models.lora import attach
from ref.models.prompts import read_prompts
from ref.scale.paths import refuse_unwritable
from ref.scoring import encoders
from ref.scoring import load as rewards
from ref.scoring.encoders import load_encoder
from ref.scoring.image_reward import HUB
from ref.scoring.rules import quoted
from ref.scoring.served import nearby
from ref.scoring.unified_reward import UnifiedReward

from ..tools import DATA, exit_code, refusal

BOM = codecs.BOM_UTF8


@pytest.fixture(scope="module", autouse=True)
def one_prompt(world):
    write(world / "one.txt", "a cat on a mat\n")


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def trained(world: Path, out: Path, *options) -> list:
    """A command of ref.train on the tiny SD3; whatever is refused is refused before it trains."""
    common = ["--preset", "sd35_medium", "--method", "pec", "--model", world / "sd3", "--height", 32, "--width", 32]
    options = options if "--reward" in options else (*options, "--reward", "jpeg")
    options = options if "--encoder" in options else (*options, "--encoder", f"dino={world / 'dino'}")
    return [*common, "--cache-dir", world / "cache", "--output-dir", out, *options]


def evaluated(world: Path, *options) -> list:
    """A command of ref.evaluate on the tiny SD3, two images of one prompt."""
    common = [
        "--model",
        world / "sd3",
        "--prompts",
        world / "one.txt",
        "--rewards",
        "jpeg",
        "--encoders",
        f"dino={world / 'dino'}",
    ]
    small = ["--images-per-prompt", 2, "--steps", 1, "--height", 32, "--width", 32]
    return [*common, *small, *options]


def errors(capsys) -> list[str]:
    """The lines that begin with "error: ", where bars may stand before them; no traceback."""
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return [line for line in said.splitlines() if line.startswith("error: ")]


# prompts

READ = {
    "a byte order mark": ("p.txt", BOM + b"a cat\na dog\n", ["a cat", "a dog"]),
    "UTF-16": ("p.txt", "a cat\na d\u00f6g\n".encode("utf-16"), ["a cat", "a d\u00f6g"]),
    "UTF-16, the other way round": ("p.txt", codecs.BOM_UTF16_BE + "a cat\n".encode("utf-16-be"), ["a cat"]),
    "marks within": ("p.txt", BOM + b"a cat\n" + BOM + b"a dog", ["a cat", "a dog"]),
    "Windows and old Mac lines": ("p.txt", "a cat\r\na dog\ra cow", ["a cat", "a dog", "a cow"]),
    "other ends split nothing": ("p.txt", "a\u2028b\u2029c\x85d\x0be\x1cf\n", ["a\u2028b\u2029c\x85d\x0be\x1cf"]),
    "duplicates": ("p.txt", "a cat\na cat\n", ["a cat", "a cat"]),
    "an array": ("p.json", '["a cat", {"prompt": "a dog", "seed": 1}]', ["a cat", "a dog"]),
    "JSON lines in capitals": ("p.JSONL", '{"prompt": "a cat"}\r\n"a dog"', ["a cat", "a dog"]),
    "a table": ("p.csv", 'id,Prompt\n1,"a cat, asleep"\n2,a dog\n', ["a cat, asleep", "a dog"]),
    "semicolons": ("p.csv", BOM + b"id;prompt\n1;a cat, asleep\n", ["a cat, asleep"]),
    "tabs": ("p.tsv", 'prompt\nid "A", a cat\n', ['id "A", a cat']),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_prompts_are_read_as_meant(case, tmp_path):
    name, content, prompts = READ[case]
    assert read_prompts(write(tmp_path / name, content)) == prompts


REFUSED = {
    "Latin-1": ("p.txt", "a cat\na d\u00f6g\n".encode("latin-1"), "p.txt, line 2: byte 0xf6 is not UTF-8; it may be Latin-1"),
    "half a UTF-16": ("p.txt", "a\nb\n".encode("utf-16")[:-1], "p.txt, line 2: byte 0x0a is not whole UTF-16"),
    "UTF-16 unmarked": ("p.txt", "a cat\n".encode("utf-16-le"), "p.txt is UTF-16 without a byte order mark"),
    "a picture": ("p.txt", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "p.txt is a binary file, not text"),
    "a pickle": ("p.txt", b"\x80\x04N.", "p.txt is a binary file, not text"),
    "null characters": ("p.txt", b"a cat\0\n", "p.txt is a binary file, not text"),
    "an empty line": ("p.txt", "a cat\n \t\na dog\n", "p.txt, line 2: empty line"),
    "an empty last line": ("p.txt", "a cat\n\n", "p.txt, line 2: empty line"),
    "nothing to see": ("p.txt", "a cat\n\u200b\n", "p.txt, line 2: empty line"),
    "nothing": ("p.txt", "", "p.txt holds no prompts"),
    "a mark alone": ("p.txt", BOM, "p.txt holds no prompts"),
    "an object": ("p.json", '{"prompts": ["a cat"]}', "p.json holds JSON, but not an array"),
    "JSON lines as an array": ("p.json", '{"prompt": "a"}\n{"prompt": "b"}\n', "p.json, line 2: bad JSON (Extra data)"),
    "a number among strings": ("p.json", '["a cat", 5]', "p.json, entry 2: no prompt"),
    "an array within": ("p.json", "[" * 10**5, "p.json: bad JSON (too deep"),
    "half a character": ("p.json", '["\\ud800 cat"]', "p.json, entry 1: half of a surrogate pair"),
    "an empty array": ("p.json", "[]", "p.json holds no prompts"),
    "an empty JSON line": ("p.jsonl", '"a"\n\n"b"\n', "p.jsonl, line 2: empty line"),
    "torn JSON": ("p.JSONL", '"a"\n{"prompt":', "p.JSONL, line 2: bad JSON"),
    "another key": ("p.ndjson", '{"caption": "a"}\n', "p.ndjson, line 1: no prompt"),
    "no column prompt": ("p.csv", "a cat\na dog\n", "p.csv, line 1: no column prompt"),
    "an open comma": ("p.csv", "prompt\na cat, asleep\n", "p.csv, line 2: 2 cells where the header has 1"),
    "an open quote": ("p.csv", 'prompt\n"a cat\na dog\n', "p.csv, line 2: unexpected end of data"),
    "an empty row": ("p.csv", "id,prompt\n1,a cat\n,\n", "p.csv, line 3: empty line"),
    "an empty cell": ("p.csv", "id,prompt\n1,a cat\n2,\n", "p.csv, line 3: empty line"),
    "a header only": ("p.tsv", "id\tprompt\n", "p.tsv has a header and no rows"),
    "two columns of a name": ("p.csv", "prompt,prompt\na,b\n", "p.csv, line 1: two columns are called 'prompt'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_prompts_that_cannot_be_read_are_refused_with_file_and_line(case, tmp_path, capsys):
    name, content, message = REFUSED[case]
    file = write(tmp_path / name, content)
    assert message in refusal(evaluate.main, ["--model", "x", "--prompts", file], capsys)


@pytest.mark.parametrize(
    "source, message",
    [
        ("trian", "did you mean train?"),
        ("Evaluation", "did you mean evaluation?"),
        ("ocr.txt", "did you mean ocr?"),
        ("{}/promts.txt", "promts.txt'; did you mean prompts.txt?"),
        ("a cat on a mat", "there is no file 'a cat on a mat'; give a file with a prompt a line"),
        ("{}", "is a folder"),
        ("{}/prompts.txt/x", "there is no file"),
        ("/dev/zero", "is a device"),
        ("a\0b", "there is no file"),
        ("n" * 300, "File name too long"),
    ],
)
def test_what_is_no_file_of_prompts(source, message, world, tmp_path, capsys):
    write(tmp_path / "prompts.txt", "a cat\n")
    prompts = source.format(tmp_path)
    assert message in refusal(train.main, trained(world, tmp_path / "out", "--prompts", prompts), capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--reward", "pikscore"], "unknown reward 'pikscore'; did you mean pickscore?"),
        (["--reward", "jpeg:0.5+orc"], "unknown reward 'orc'; did you mean ocr?"),
        (["--encoder", "dinno"], "unknown encoder 'dinno'; did you mean dino?"),
        (["--encoder", "Siglip=x"], "unknown encoder 'Siglip=x'; did you mean siglip?"),
        (["--method", "pecvae"], "invalid choice 'pecvae' for argument '--method'; did you mean pcvae?"),
        (["--model", "sd35_medum"], "there is no folder sd35_medum; did you mean sd35_medium?"),
        (["--preset", "sd35_medum"], "did you mean sd35_medium?"),
        (["--kind", "flow_sd"], "did you mean flow_sde?"),
    ],
)
def test_near_misses_are_suggested(options, message, world, tmp_path, capsys):
    assert message in refusal(train.main, trained(world, tmp_path / "out", *options), capsys)
    assert not (tmp_path / "out").exists()


# what a reward demands of prompts

TARGETS = {
    'a 12" vinyl record with the word "JAZZ"': "JAZZ",
    "a man 6'2\" tall under a sign \"EXIT\"": "EXIT",
    'a 5" by 7" card saying "HI"': "HI",
    'a 7"x5" print, "LP"': "LP",
    'a board of 12 " by 7 " saying "LP"': "LP",
    "a 12\u201d record \u201cJAZZ\u201d": "JAZZ",
    "\u201ca 12\" record\u201d in neon": 'a 12" record',
    '"DON\'T PANIC" on a 4\' wall': "DON'T PANIC",
    'the number "12" on a door': "12",
    'Route 66 "Main Street"': "Main Street",
    "\u201eB\u00e4ckerei\u201c an der Wand": "B\u00e4ckerei",
    "\u5199\u7740\"\u4f60\u597d\"\u7684": "\u4f60\u597d",
    'a sign saying"OPEN"': "OPEN",
    'a neon "Blue Note" over " BAR "': "Blue Note BAR",
}  # fmt: skip


@pytest.mark.parametrize("prompt", TARGETS)
def test_ocr_looks_for_what_is_quoted(prompt):
    assert quoted(prompt) == TARGETS[prompt]


@pytest.mark.parametrize(
    "prompt, message",
    [
        ('a sign "OPEN', "cannot pair the double quotes of 'a sign \"OPEN'"),
        ('a sign OPEN"', "cannot pair"),
        ('a sign "a 12" record"', "cannot pair"),
        ('a "7" single" and a "5" disc"', "cannot pair"),
        ('\u201cOPEN" in neon', "cannot pair"),
        ('a 12" record', "needs a prompt with the text in double quotes"),
        ("a sign 'OPEN'", "needs a prompt with the text in double quotes"),
        ('a sign ""', "needs a prompt with the text in double quotes"),
    ],
)
def test_prompts_that_ocr_cannot_judge_are_refused_before_anything_is_loaded(
    prompt, message, world, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("ref.models.load.load", None)
    file = write(tmp_path / "prompts.txt", f'a sign "STOP"\n{prompt}\n')
    for asked in (["--prompts", file], ["--prompts", "ocr", "--evaluation-prompts", file]):
        options = ["--reward", "pickscore:0.7+ocr:0.3", *asked]
        assert message in refusal(train.main, trained(world, tmp_path / "out", *options), capsys)
    assert not (tmp_path / "out").exists()
    assert message in refusal(evaluate.main, ["--model", "x", "--rewards", "jpeg", "ocr", "--prompts", file], capsys)


def test_a_sum_and_a_class_of_one_s_own_are_asked_too(monkeypatch):
    class Short(rewards.Reward):
        @staticmethod
        def check_prompts(prompts):
            if max(map(len, prompts)) > 9:
                raise ValueError("short prompts only")

    monkeypatch.setitem(rewards.REWARDS, "short", lambda name, *_: Short(name))
    total = rewards.load_reward("jpeg:0.5+short")
    total.check_prompts(["a cat"])
    with pytest.raises(ValueError, match="short prompts only"):
        total.check_prompts(["a cat on a mat"])
    monkeypatch.setitem(rewards.REWARDS, "short", Short)
    with pytest.raises(ValueError, match="short prompts only"):
        rewards.check_prompts("jpeg:0.5+short", ["a cat on a mat"])


@pytest.mark.parametrize(
    "prompts, evaluation, expected",
    [("train", None, "evaluation"), ("ocr", None, "ocr"), ("ocr", "train", "train"), ("many", None, "64 of them")],
)
def test_evaluation_prompts_follow_the_prompts(prompts, evaluation, expected, world, tmp_path, monkeypatch):
    from ref.presets import PRESETS

    seen = []
    monkeypatch.setattr("ref.models.load.load", lambda model, prompts, **options: seen.extend(prompts) or 1 / 0)
    many = write(tmp_path / "many.txt", "\n".join(f"a cat {n}" for n in range(1000)))
    prompts = str(many) if prompts == "many" else prompts
    preset = PRESETS["sd35_medium"]
    reward = "pickscore:0.7+ocr:0.3" if expected == "ocr" else "jpeg"  # README's line
    options = preset.options.model_copy(update=dict(prompts=prompts, evaluation_prompts=evaluation, reward=reward))
    with pytest.raises(ZeroDivisionError):
        preset.task("dino", options)
    rest = seen[len(read_prompts(prompts)) :]
    if expected == "64 of them":
        assert 60 <= len(rest) <= 64 and rest[-1] > "a cat 9"
    else:
        assert rest == read_prompts(expected)


# tables


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "is empty; its first line must name the columns"),
        ("name,pickscore\n", "has a header and no rows"),
        ("pickscore\n0.2\n", "line 1: no column name or method"),
        ("name,other\na,1\n", "line 1: no column of the tables"),
        ("name,picscore\na,0.2\n", "line 1: unknown column 'picscore'; did you mean pickscore?"),
        ("name,pickscore,pickscore\na,1,2\n", "line 1: two columns are called 'pickscore'"),
        ("name,pickscore\na,0.2\na,0.3\n", "line 3: 'a' is in"),
        ("name,pickscore\n,0.2\n", "line 2: no name"),
        ("name,pickscore\na,high\n", "line 2: pickscore is 'high', not a finite number"),
        ("name,pickscore\na,0.2\nb,inf\n", "line 3: pickscore is 'inf', not a finite number"),
        ("name,pickscore\na,-1e999\n", "line 2: pickscore is '-1e999', not a finite number"),
        ("name,pickscore\na,nan\n", "line 2: pickscore is 'nan', not a finite number"),
        ("name;pickscore\na;0,226\n", "line 2: pickscore is '0,226', not a finite number; write 0.226"),
        ("name,pickscore\na,0.2,0.3\n", "line 2: 3 cells where the header has 2"),
        ("name,pickscore\na,0.2\n\nb,0.3\n", "line 3: empty line"),
        (b"name,pickscore\nB\xe4r,0.2\n", "line 2: byte 0xe4 is not UTF-8"),
        (b"PK\x03\x04\0\0", "is a binary file, not text"),
    ],
)
def test_tables_are_refused_with_file_and_line(content, message, tmp_path, capsys):
    file = write(tmp_path / "rows.csv", content)
    line = refusal(evaluate.main, ["--table", file], capsys)
    assert message in line and "rows.csv" in line


@pytest.mark.parametrize("content", ["name;pickscore;var_dino\na;1;\nb;2;3\n", "name\tpickscore\na\t1\nb\t2\n"])
@pytest.mark.parametrize("mark", [b"", BOM])
def test_tables_of_any_separator_are_read_and_two_rows_warned_of(content, mark, tmp_path, capsys):
    file = write(tmp_path / "rows.csv", mark + content.encode())
    assert evaluate.main(["--table", str(file)]) == 0
    said = capsys.readouterr()
    assert "**2.000**" in said.out and said.err.startswith("warning: 2 rows") and len(said.err.splitlines()) == 1
    assert "'a' is in" in refusal(evaluate.main, ["--table", file, file], capsys)
    assert evaluate.main(["--table", str(DATA / "paper_table1.csv"), "--output", str(tmp_path / "table.md")]) == 0
    assert (tmp_path / "table.md").read_text().startswith("|  | pickscore") and not capsys.readouterr().err


# places that cannot be written


@pytest.mark.parametrize("option", ["--output", "--images"])
@pytest.mark.parametrize("place", ["{}/file/row.csv", "/proc/x/row.csv", "{}/made/" + "n" * 300, "a\0b/c"])
def test_places_are_tried_before_the_work(option, place, tmp_path, capsys):
    write(tmp_path / "file", "x")
    line = refusal(evaluate.main, ["--model", "/nowhere", option, place.format(tmp_path)], capsys)
    assert f"cannot write {option}" in line
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_place_that_can_be_written_is_left_as_it_was(tmp_path):
    refuse_unwritable(tmp_path / "a" / "b" / "row.csv", "--output")
    assert not any(tmp_path.iterdir())
    kept = write(tmp_path / "row.csv", "kept")
    refuse_unwritable(kept, "--output")
    assert kept.read_text() == "kept" and len(list(tmp_path.iterdir())) == 1
    for place, reason in ((tmp_path, "is a folder"), ("/dev/null", "is a device")):
        with pytest.raises(OSError, match=reason):
            refuse_unwritable(place, "--output")


# LoRAs


@pytest.fixture(scope="module")
def loras(world, tmp_path_factory) -> Path:
    """sd3, flux: as ref.train saves them; peft: sd3's numbers in PEFT's form; full: all weights."""
    folder = tmp_path_factory.mktemp("loras")
    options = dict(cache_dir=world / "cache", max_sequence_length=16)
    for kind in ("sd3", "flux"):
        model = load(world / kind, ["a cat"], 32, 32, lora_rank=4, lora_alpha=8, **options)
        torch.manual_seed(0)
        for name, weight in model.transformer.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.5)
        model.save(folder / kind)
    full = load(world / "sd3", ["a cat"], 32, 32, lora_rank=None, keep_base=False, **options)
    with torch.no_grad():
        full.transformer.proj_out.weight.mul_(2)
    full.save(folder / "full")
    peft(folder, folder / "peft")
    return folder


def peft(loras: Path, folder: Path, kind: str = "sd3", change=lambda weights: weights, **config) -> Path:
    """PEFT's form of a LoRA that ref.train saved."""
    folder.mkdir()
    weights = load_file(loras / kind / "pytorch_lora_weights.safetensors")
    weights = {name.replace("transformer.", "base_model.model.", 1): value for name, value in weights.items()}
    save_file(change(weights), folder / "adapter_model.safetensors")
    config = dict(peft_type="LORA", r=4, lora_alpha=8, target_modules=["to_q"], task_type=None) | config
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def changed(loras: Path, folder: Path, change) -> Path:
    """sd3's LoRA with other tensors."""
    folder.mkdir()
    weights = change(load_file(loras / "sd3" / "pytorch_lora_weights.safetensors"))
    save_file(weights, folder / "pytorch_lora_weights.safetensors")
    return folder


def pictures(world: Path, lora: Path | None = None, kind: str = "sd3") -> torch.Tensor:
    return evaluate.draw(evaluate.load_pipeline(str(world / kind), lora and str(lora), "cpu"), "a cat", 0, 1, 1,
                         num_inference_steps=2, height=32, width=32)  # fmt: skip


def test_peft_s_form_is_the_same_lora_with_its_own_scale(world, loras, tmp_path):
    base, tuned = pictures(world), pictures(world, loras / "sd3")
    assert (tuned - base).abs().max() > 1e-2
    assert torch.equal(pictures(world, loras / "peft"), tuned)
    twice = peft(loras, tmp_path / "twice", lora_alpha=16)
    half = {name: value / 2 if "lora_B" in name else value for name, value in load_file(twice / "adapter_model.safetensors").items()}  # fmt: skip
    assert (pictures(world, twice) - tuned).abs().max() > 1e-3
    save_file(half, twice / "adapter_model.safetensors")
    assert torch.equal(pictures(world, twice), tuned)  # alpha over rank is applied
    assert torch.equal(pictures(world, loras / "sd3" / "pytorch_lora_weights.safetensors"), tuned)  # the file itself


def test_all_weights_and_a_lora_are_evaluated_by_the_command(world, loras, tmp_path, capsys):
    assert (pictures(world, loras / "full") - pictures(world)).abs().max() > 1e-2
    assert (
        evaluate.main([str(a) for a in evaluated(world, "--lora", loras / "peft", "--output", tmp_path / "r.csv")]) == 0
    )
    [row] = evaluate.read_rows([tmp_path / "r.csv"])
    assert row["name"].endswith("peft")
    said = capsys.readouterr().err
    assert "No LoRA keys" not in said and "Traceback" not in said


def first(weights: dict) -> str:
    return min(weights)


FOREIGN = {  # what the folder of --lora holds -> what is said of it
    "another architecture": (lambda loras, at: loras / "flux", "is of a FluxTransformer2DModel, not a SD3Transformer2DModel"),
    "another architecture in PEFT's form": (lambda loras, at: peft(loras, at, "flux"), "is a LoRA of another model: 3 of its"),
    "another size": (
        lambda loras, at: changed(loras, at, lambda w: {k: v.repeat(1, 2) if "lora_A" in k else v for k, v in w.items()}),
        "is 64 -> 32 there, 32 -> 32 in this SD3Transformer2DModel"),
    "a layer too many": (
        lambda loras, at: changed(loras, at, lambda w: w | {f"transformer.new.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}),
        "1 of its 16 layers are not in SD3Transformer2DModel, new among them"),
    "keys without a prefix": (
        lambda loras, at: changed(loras, at, lambda w: {k.removeprefix("transformer."): v for k, v in w.items()}),
        "is no LoRA of StableDiffusion3Pipeline: it holds transformer_blocks.0"),
    "half a layer": (
        lambda loras, at: changed(loras, at, lambda w: {k: v for k, v in w.items() if k != first(w)}), "do not belong together"),
    "a DoRA": (
        lambda loras, at: changed(loras, at, lambda w: w | {first(w).replace("lora_A.weight", "dora_scale"): torch.ones(4)}),
        "is a DoRA"),
    "no LoRA": (lambda loras, at: changed(loras, at, lambda w: {"transformer.proj.weight": torch.ones(3)}), "no half of a LoRA"),
    "a NaN": (lambda loras, at: changed(loras, at, lambda w: {k: v * torch.nan for k, v in w.items()}), "holds a NaN"),
    "nothing in the file": (lambda loras, at: changed(loras, at, lambda w: {}), "it holds nothing"),
    "PEFT's form without its scale": (lambda loras, at: peft(loras, at, lora_alpha=None), "lora_alpha must be a number above 0"),
    "another kind of PEFT": (lambda loras, at: peft(loras, at, peft_type="LOHA"), "is of a LOHA, not a LoRA"),
    "PEFT's form of another class": (
        lambda loras, at: peft(loras, at, auto_mapping={"base_model_class": "UNet2DConditionModel"}),
        "adapter_config.json is of a UNet2DConditionModel"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_a_foreign_lora_is_refused(case, world, loras, tmp_path, capsys):
    make, message = FOREIGN[case]
    lora = make(loras, tmp_path / "lora")
    arguments = evaluated(world, "--lora", lora, "--output", tmp_path / "out" / "row.csv")
    assert exit_code(evaluate.main, arguments) == 2
    [line] = errors(capsys)  # after the bars of loading
    assert message in line and str(lora) in line and ";" in line
    assert not (tmp_path / "out").exists()


def test_folders_without_a_lora_are_refused(world, loras, tmp_path):
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(world / "sd3")
    run = tmp_path / "run"
    shutil.copytree(loras / "sd3", run / "weights")
    alone = peft(loras, tmp_path / "alone")
    (alone / "adapter_config.json").unlink()
    torn = peft(loras, tmp_path / "torn")
    write(torn / "adapter_config.json", "{")
    two = shutil.copytree(loras / "sd3", tmp_path / "two")
    (two / "pytorch_lora_weights.safetensors").rename(two / "a.safetensors")
    shutil.copy(two / "a.safetensors", two / "b.safetensors")
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickled").mkdir()
    write(tmp_path / "pickled" / "adapter_model.bin", b"x")
    (tmp_path / "junk").mkdir()
    write(tmp_path / "junk" / "pytorch_lora_weights.safetensors", b"junk")
    lacking = shutil.copytree(loras / "full", tmp_path / "lacking")
    file = lacking / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights.pop("proj_out.weight")
    save_file(weights, file)
    nameless = shutil.copytree(loras / "full", tmp_path / "nameless")
    (nameless / "config.json").unlink()
    foreign = shutil.copytree(loras / "full", tmp_path / "foreign")
    write(foreign / "config.json", '{"_class_name": "FluxTransformer2DModel"}')
    for folder, message in {
        run: f"did you mean {run}/weights?",
        alone: "has no adapter_config.json beside it",
        torn: "adapter_config.json, line 1: bad JSON",
        two: "holds 2 .safetensors files",
        tmp_path / "empty": "holds no .safetensors file",
        tmp_path / "pickled": "but adapter_model.bin",
        tmp_path / "pickled" / "adapter_model.bin": "is no .safetensors file",
        tmp_path / "junk": "pytorch_lora_weights.safetensors is damaged",
        world / "sd3": "is a whole pipeline; give it as --model",
        Path("/nowhere/lora"): "there is no folder or file /nowhere/lora",
        lacking: "lacks the weight proj_out.weight",
        nameless: "no config.json",
        foreign: "holds all weights of a FluxTransformer2DModel, not of a SD3Transformer2DModel",
    }.items():
        with pytest.raises((OSError, ValueError)) as caught:
            attach(pipe, str(folder))
        assert message in str(caught.value) and "\n" not in str(caught.value), caught.value
        assert str(folder) in str(caught.value)


# folders of models


def spoiled(world: Path, at: Path, file: str, content: bytes) -> Path:
    shutil.copytree(world / "sd3", at)
    (at / file).write_bytes(content)
    return at


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("model_index.json", b"{", "model_index.json, line 1: bad JSON"),
        ("model_index.json", b"[]", "model_index.json holds JSON, but not an object"),
        ("model_index.json", b'{"_class_name": "\xe4"}', "model_index.json, line 1: byte 0xe4 is not UTF-8"),
        ("model_index.json", b"{}", "model_index.json names no pipeline"),
        ("transformer/config.json", b"", "transformer/config.json, line 1: bad JSON"),
        ("vae/config.json", b"{}", "vae/config.json"),
        ("transformer/diffusion_pytorch_model.safetensors", b"junk", "diffusion_pytorch_model.safetensors is damaged"),
        ("transformer/diffusion_pytorch_model.safetensors", b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        ("text_encoder/model.safetensors", b"junk", "text_encoder/model.safetensors is damaged"),
        ("text_encoder_2/config.json", b"x", "text_encoder_2/config.json, line 1: bad JSON"),
        ("scheduler/scheduler_config.json", b"{'a'}", "scheduler_config.json, line 1: bad JSON"),
    ],
)  # fmt: skip
def test_damaged_files_of_a_pipeline_are_named(file, content, message, world, tmp_path, capsys):
    model = spoiled(world, tmp_path / "sd3", file, content)
    options = ["--model", model, "--cache-dir", tmp_path / "cache"]
    said = refusal(train.main, [*trained(world, tmp_path / "out"), *options], capsys)
    assert message in said and ";" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "file, name",
    [
        ("transformer/diffusion_pytorch_model.safetensors", "proj_out.weight"),
        ("vae/diffusion_pytorch_model.safetensors", "decoder.conv_out.bias"),
        ("text_encoder_3/model.safetensors", "encoder.block.1.layer.0.SelfAttention.k.weight"),
        ("text_encoder/model.safetensors", "text_projection.weight"),
    ],
)
def test_weights_that_are_missing_are_not_drawn_at_random(file, name, world, tmp_path, capsys):
    """Neither in training nor in the evaluation of a pipeline, text encoders included."""
    model = shutil.copytree(world / "sd3", tmp_path / "sd3")
    weights = load_file(model / file)
    weights.pop(name)
    save_file(weights, model / file, {"format": "pt"})
    options = ["--model", model, "--prompts", world / "one.txt"]
    cache = ["--cache-dir", tmp_path / "cache"]
    assert exit_code(train.main, [*trained(world, tmp_path / "out"), *options, *cache]) == 2
    [line] = errors(capsys)
    assert f"lacks the weight {name}" in line and not (tmp_path / "out").exists()
    found = [*options, "--rewards", "jpeg", "--encoders", f"dino={world / 'dino'}"]
    assert exit_code(evaluate.main, found) == 2
    [line] = errors(capsys)
    assert f"lacks the weight {name}" in line


def test_a_stray_folder_among_the_text_encoders_is_passed_over(world, tmp_path):
    model = shutil.copytree(world / "sd3", tmp_path / "sd3")
    (model / "text_encoder" / "old").mkdir()
    write(model / "text_encoder" / "old" / "model.safetensors", "x")
    (model / "tokenizer_9" / "empty").mkdir(parents=True)
    (model / "text_encoder" / "gone").symlink_to("/nowhere")
    assert locate(model).identity == locate(world / "sd3").identity


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("config.json", b"{", "config.json, line 1: bad JSON"),
        ("config.json", b"[]", "config.json holds JSON, but not an object"),
        ("config.json", b"\xff\xfe", "config.json, line 1: bad JSON"),
        ("model.safetensors", b"junk", "model.safetensors is damaged"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        ("processor_config.json", b"x", "processor_config.json, line 1: bad JSON"),
        ("tokenizer.json", b"x", "tokenizer.json, line 1: bad JSON"),
    ],
)
def test_damaged_files_of_an_encoder_are_named(file, content, message, world, tmp_path):
    folder = shutil.copytree(world / "clip", tmp_path / "clip")
    (folder / file).write_bytes(content)
    with pytest.raises((OSError, ValueError)) as caught:
        load_encoder(f"clip={folder}")
    assert message in str(caught.value) and "\n" not in str(caught.value) and ";" in str(caught.value)


def test_pickscore_s_folder_without_a_processor_takes_clip_h_s(world, tmp_path, monkeypatch):
    folder = shutil.copytree(world / "clip", tmp_path / "pickscore")
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    write(world / "clip" / "preprocessor_config.json", (world / "clip" / "processor_config.json").read_bytes())
    monkeypatch.setitem(encoders.HUB, "clip_h", str(world / "clip"))
    images = torch.rand(2, 3, 32, 32)
    try:
        torch.testing.assert_close(
            load_encoder(f"pickscore={folder}")(images), load_encoder(f"pickscore={world / 'clip'}")(images)
        )
    finally:
        (world / "clip" / "preprocessor_config.json").unlink()
    with pytest.raises(OSError, match="cannot load clip="):
        load_encoder(f"clip={folder}")
    assert HUB == "zai-org/ImageReward"


def test_siglip_is_loaded_without_a_line_on_the_tower_that_is_not_asked_for(tmp_path, capfd):
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    config = SiglipConfig(text_config=small, vision_config=small | dict(image_size=32, patch_size=8))
    SiglipModel(config).save_pretrained(tmp_path)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    capfd.readouterr()
    load_encoder(f"siglip={tmp_path}")
    said = "".join(capfd.readouterr())
    assert "UNEXPECTED" not in said and "text_model" not in said


# embeddings, home and proxies


def test_a_complete_cache_may_be_read_only(world, tmp_path, monkeypatch):
    options = dict(cache_dir=tmp_path / "cache", max_sequence_length=16, lora_rank=4)
    load(world / "sd3", ["a cat"], 32, 32, **options)

    class Locked:
        def __init__(self, path):
            self.path = path

        def acquire(self):
            raise PermissionError(13, "Permission denied", str(self.path))

    monkeypatch.setattr(embeddings, "FileLock", Locked)
    load(world / "sd3", ["a cat"], 32, 32, **options)
    with pytest.raises(OSError, match="cannot write to .*cache: Permission denied; give another --cache-dir"):
        load(world / "sd3", ["a dog"], 32, 32, **options)


@pytest.mark.parametrize("place", ["file", "file/cache", "n" * 300])
def test_a_cache_that_cannot_be_made(place, world, tmp_path, capsys):
    write(tmp_path / "file", "x")
    options = ["--cache-dir", tmp_path / place]
    said = refusal(train.main, [*trained(world, tmp_path / "out"), *options], capsys)
    assert "cannot write to" in said and "--cache-dir" in said or "File name too long" in said
    assert not (tmp_path / "out").exists()


def test_without_a_home_only_who_needs_it_hears_of_it(world, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    import importlib

    importlib.reload(embeddings)
    with pytest.raises(OSError, match="set HOME or give --cache-dir"):
        load(world / "sd3", ["a cat"], 32, 32)
    load(world / "sd3", ["a cat"], 32, 32, cache_dir=world / "cache", max_sequence_length=16, lora_rank=4)


def test_a_server_nearby_is_asked_without_a_proxy(monkeypatch):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            content = b'{"data": [{"id": "judge"}]}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    assert UnifiedReward("unified_reward", f"http://127.0.0.1:{server.server_port}/v1", attempts=1).served == "judge"
    server.shutdown()
    server.server_close()
    assert all(map(nearby, ("http://localhost:80", "http://[::1]:80/v1", "http://10.0.0.7", "http://gpu3:8080")))
    assert not any(map(nearby, ("http://example.org/v1", "https://8.8.8.8")))
