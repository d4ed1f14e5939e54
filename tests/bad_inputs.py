"""Bad inputs over all commands: what is typed, the exit code, and what the line must say.

``{name}`` in a word stands for a place that :func:`make_places` makes. A line is one input.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from own_tasks import write_own_tasks

__all__ = ["INPUTS", "make_places"]

LONG = "x" * 5000
DIGITS = "9" * 5000
DEEP = "[" * 100_000

EVAL = "eval --tasks act_demo_word --artifact none --device cpu --output {out}"
MODEL = f"{EVAL} --pretrained {{model}}"
SEARCH = "search --output {out}/a.json"
JUDGE = "judge {answers} --output {out}"
REGRESS = "regress --output {out}"
RUN = "run --model hf-act --device cpu --tasks act_demo_word --limit 1"
SPELL = "spelling of options and commands"


def make_places(folder: Path, checkpoint: Path) -> dict[str, str]:
    """Make every file and folder that the inputs name; returns them by name."""
    places = {name: folder / name for name in (
        "empty", "file", "noconfig", "badconfig", "badjson", "noweights", "badweights",
        "badtokenizer", "otherwords", "adapter", "own", "answers", "suite", "listing",
        "emptyjson", "text", "badyaml", "gone", "binary", "badartifact", "badrecipe", "taskless",
        "nulls", "results", "deep", "digits", "deepyaml", "twice", "nan",
    )}  # fmt: skip
    for name in ("empty", "noconfig", "badconfig", "badjson", "badtokenizer", "adapter", "answers",
                 "suite", "taskless", "results"):  # fmt: skip
        places[name].mkdir()
    for name in ("noweights", "badweights", "otherwords", "badtokenizer"):
        shutil.copytree(checkpoint, places[name], dirs_exist_ok=True)
    (places["noconfig"] / "model.safetensors").write_bytes(b"")
    (places["badconfig"] / "config.json").write_text('{"model_type": "nothing-known"}')
    (places["badjson"] / "config.json").write_text("{")
    (places["noweights"] / "model.safetensors").unlink()
    (places["badweights"] / "model.safetensors").write_bytes(b"not safetensors at all")
    (places["badtokenizer"] / "tokenizer.json").write_text('{"model": 3}')
    _more_words(places["otherwords"])
    (places["adapter"] / "adapter_config.json").write_text("{}")
    places["file"].write_text("text")
    places["text"].write_text("words that are no JSON\n")
    places["listing"].write_text("- a\n- b\n")
    places["emptyjson"].write_text("{}")
    places["nulls"].write_text('{"act_demo_word": null}')
    places["badyaml"].write_text("a: [")
    places["binary"].write_bytes(b"\xff\xfe\x00\x80" * 20)
    places["badartifact"].write_text('{"schema": "act-harness/heads/1", "hedas": {}}')
    places["badrecipe"].write_text("tasks: [a]\nsampels: 3\n")
    places["deep"].write_text(DEEP + "]" * len(DEEP))
    places["deepyaml"].write_text(f"tasks: {'[' * 5000}{']' * 5000}\n")
    places["digits"].write_text(f'{{"heads": {DIGITS}}}')
    places["twice"].write_text('{"name": "a", "name": "b"}')
    places["nan"].write_text('{"name": NaN}')
    (places["suite"] / "suite.yaml").write_text("name: x\nmodle: {}\n")
    (places["taskless"] / "a.yaml").write_text("dataset_path: json\n")
    write_own_tasks(places["own"], "own_task")
    return {
        **{name: str(path) for name, path in places.items()},
        "model": str(checkpoint),
        "out": str(folder / "out"),
        "long": LONG,
        "number": DIGITS,
    }


def _more_words(folder: Path) -> None:
    """Give a tokenizer more words than its model has vectors."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    words = content["model"]["vocab"]
    words |= {f"<word{n}>": len(words) + n for n in range(50)}
    file.write_text(json.dumps(content), encoding="utf-8")


INPUTS: tuple[tuple[str, int, str], ...] = (
    # spelling: commands, options, missing ones
    ("evla", 2, "No such command 'evla'"),
    ("eval --limt 3", 2, "No such option: --limt"),
    ("eval --task x", 2, "No such option: --task"),
    ("eval extra --tasks x", 2, "extra"),
    ("eval", 2, "no model was named"),
    ("eval --tasks", 2, "requires an argument"),
    ("search --lmit 1", 2, "No such option"),
    ("search", 2, "neither a recipe nor tasks"),
    ("compare", 2, "(?i)Missing argument 'A'"),
    ("compare {empty}", 2, "(?i)Missing argument 'B'"),
    ("judge", 2, "(?i)Missing argument 'PATHS"),
    ("regress", 2, "Missing option '--suite'"),
    ("fetch", 2, "Missing option"),
    ("fetch --tasks act_demo_word", 2, "Missing option '--dest'"),
    ("artifact", 2, "Usage"),
    ("artifact shwo x", 2, "No such command 'shwo'"),
    ("artifact show", 2, "Missing argument"),
    ("artifact list extra", 2, "extra"),
    ("artifact verify x", 2, "Missing argument"),
    ("bench", 2, "Usage"),
    ("bench atention", 2, "No such command"),
    ("doctor --now", 2, "No such option"),
    ("tasks-path x", 2, "extra argument"),
    ("--verison", 2, "No such option"),
    # numbers
    (f"{MODEL} --limit 0", 2, "--limit is 0.*expected a whole number"),
    (f"{MODEL} --limit -1", 2, "--limit is -1"),
    (f"{MODEL} --limit 2.5", 2, "--limit is 2.5"),
    (f"{MODEL} --limit nan", 2, "--limit is nan"),
    (f"{MODEL} --limit inf", 2, "--limit is inf"),
    (f"{MODEL} --limit x", 2, "'x'"),
    (f"{MODEL} --limit {{number}}", 2, "--limit"),
    (f"{MODEL} --seed -1", 2, "--seed is -1, expected a whole number from 0"),
    (f"{MODEL} --seed 4294967296", 2, "--seed is 4294967296"),
    (f"{MODEL} --seed x", 2, "'x'"),
    (f"{MODEL} --seed 1.5", 2, "'1.5'"),
    (f"{MODEL} --seed {{number}}", 2, "--seed"),
    (f"{MODEL} --num_fewshot -1", 2, "--num-fewshot is -1"),
    (f"{MODEL} --num-fewshot x", 2, "'x'"),
    (f"{MODEL} --num-fewshot {{number}}", 2, "--num-fewshot"),
    (f"{MODEL} --fewshot-seeds ''", 2, "--fewshot-seeds is empty"),
    (f"{MODEL} --fewshot-seeds ,", 2, "--fewshot-seeds is empty"),
    (f"{MODEL} --fewshot-seeds 1,x", 2, "--fewshot-seeds holds 'x'"),
    (f"{MODEL} --fewshot-seeds 1,-2", 2, "--fewshot-seeds is -2"),
    (f"{MODEL} --fewshot-seeds 1,1", 2, "names a seed twice"),
    (f"{MODEL} --fewshot-seeds {{number}}", 2, "--fewshot-seeds holds"),
    (f"{MODEL} --batch-size 0", 2, "--batch-size is '0', expected"),
    (f"{MODEL} --batch-size -4", 2, "--batch-size is '-4'"),
    (f"{MODEL} --batch-size x", 2, "--batch-size is 'x'"),
    (f"{MODEL} --batch-size 1.5", 2, "--batch-size is '1.5'"),
    (f"{MODEL} --batch-size ''", 2, "--batch-size is ''"),
    (f"{MODEL} --batch-size auto:0", 2, "--batch-size is 'auto:0'"),
    (f"{MODEL} --batch-size automatic", 2, "--batch-size is 'automatic'"),
    (f"{MODEL} --batch-size {{number}}", 2, "--batch-size is"),
    # options that exclude or need each other
    (f"{MODEL} --samples {{nulls}} --limit 3", 2, "--samples and --limit exclude"),
    (f"{MODEL} --fewshot-as-multiturn", 2, "needs --apply-chat-template"),
    (f"{MODEL} --fewshot-as-multiturn maybe", 2, "'maybe', expected true or false"),
    (f"{MODEL} --apply-chat-template nosuch", 2, "no chat template 'nosuch'"),
    (f"{MODEL} --samples {{nulls}}", 2, "no list of documents for 'act_demo_word'"),
    (f"{MODEL} --samples {{text}}", 2, "is not JSON.*expected"),
    (f"{MODEL} --samples {{gone}}", 2, "no such file"),
    (f"{MODEL} --samples {{long}}", 2, "expected"),
    (f"{MODEL} --samples {{binary}}", 2, "--samples"),
    (f"{MODEL} --samples {{emptyjson}}", 2, "--samples holds {}"),
    (f"{MODEL} --samples {{own}}", 2, "expected"),
    (f"{MODEL} --samples '{{{{\"act_demo_word\": [-1]}}}}'", 2, "is -1, expected a whole"),
    (f"{MODEL} --samples '{{{{\"act_demo_word\": [null]}}}}'", 2, "holds null"),
    (f"{MODEL} --samples '{{{{\"act_demo_word\": [1.5]}}}}'", 2, "is 1.5"),
    (f"{MODEL} --samples '{{{{\"act_demo_word\": []}}}}'", 2, "no list of documents"),
    (f"{MODEL} --samples '{{{{\"act_demo_wrod\": [1]}}}}'", 2, "did you mean 'act_demo_word'"),
    (f"{MODEL} --samples '{{{{\"act_demo_word\": [999999]}}}}'", 2, "asks for document 999999"),
    (f"{MODEL} --gen_kwargs temperature", 2, "--gen_kwargs cannot be read"),
    (f"{MODEL} --gen_kwargs '{{{{bad'", 2, "--gen_kwargs cannot be read"),
    (f"{MODEL} --metadata x", 2, "--metadata cannot be read"),
    (f"{MODEL} --wandb-entity me", 2, "--wandb-entity was given without --wandb-project"),
    (f"{MODEL} --wandb-tags a", 2, "without --wandb-project"),
    (f"{MODEL} --wandb-mode never", 2, "'never'"),
    (f"{MODEL} --wandb-samples -1", 2, "-1"),
    (f"{MODEL} --wandb-timeout 0", 2, "--wandb-timeout"),
    (f"{MODEL} --config {{gone}}", 2, "no such file; --config"),
    (f"{MODEL} --config {{badyaml}}", 2, "YAML.*--config"),
    (f"{MODEL} --config {{listing}}", 2, "holds list"),
    (f"{MODEL} --config {{badrecipe}}", 2, "unknown option 'sampels'; did you mean 'samples'"),
    (f"{MODEL} --config {{binary}}", 2, "--config"),
    # tasks
    ("eval --pretrained {model} --tasks act_demo_wrod", 2, "did you mean 'act_demo_word'"),
    ("eval --pretrained {model} --tasks ''", 2, "no task was named"),
    ("eval --pretrained {model} --tasks ,,", 2, "no task was named"),
    ("eval --pretrained {model} --tasks {long}", 2, "unknown task"),
    ("eval --pretrained {model} --tasks {gone}.yaml", 2, "no task file"),
    ("eval --pretrained {model} --tasks {long}.yaml", 2, "no task file"),
    ("eval --pretrained {model} --tasks {empty}", 2, "holds no YAML file that defines a task"),
    ("eval --pretrained {model} --tasks {taskless}/a.yaml", 2, "cannot be read|defines no task"),
    ("eval --pretrained {model} --tasks zzz_*", 2, r"unknown task 'zzz_\*'"),
    (f"{MODEL} --include_path {{gone}}", 2, "--include_path .*no such folder"),
    (f"{MODEL} --include_path {{file}}", 2, "no such folder"),
    (f"{MODEL} --include_path {{long}}", 2, "no such folder"),
    ("search --pretrained {model} --tasks act_demo_wrod", 2, "did you mean"),
    ("search --pretrained {model} --tasks own_task --include_path {gone}", 2, "no such folder"),
    ("fetch --tasks act_demo_wrod --dest {out}", 2, "did you mean"),
    ("fetch --tasks '' --dest {out}", 2, "no task was named"),
    ("fetch --tasks own_task --include-path {gone} --dest {out}", 2, "no such folder"),
    ("fetch --tasks {own}/own_task.yaml --dest {out}", 2, "dataset_kwargs data_files"),
    # places to write to
    ("eval --tasks act_demo_word --pretrained {model} --output {file}", 3, "file"),
    ("eval --tasks act_demo_word --pretrained {model} --output {file}/below", 3, "file"),
    ("eval --tasks act_demo_word --pretrained {model} --output {long}", 3, "xxx"),
    ("search --tasks act_demo_word --pretrained {model} --output {own}", 2, "is a folder"),
    ("search --tasks act_demo_word --pretrained {model} --output {file}/a.json", 3, "file"),
    ("search --tasks act_demo_word --pretrained {model} --prepare {own}", 2, "is a folder"),
    ("fetch --tasks act_demo_word --dest {file}", 3, "file"),
    ("fetch --tasks act_demo_word --dest {long}", 3, "xxx"),
    ("compare {empty} {empty} --output {file}", 3, "file"),
    ("regress --suite smollm2-goldens --output {file}", 3, "file"),
    ("bench memory --shape tiny --output {file}", 3, "file"),
    (
        "run --tasks act_demo_word --model hf-act --model_args pretrained={model},artifact=none"
        " --output_path {file}",
        3,
        "file",
    ),
    # the model
    (f"{EVAL} --pretrained {{gone}}", 3, "no model at .*gone: no such folder"),
    (f"{EVAL} --pretrained {{empty}}", 3, "holds no config.json"),
    (f"{EVAL} --pretrained {{file}}", 3, "it is a file"),
    (f"{EVAL} --pretrained {{long}}", 3, "no model at x+...x+: no such folder"),
    (f"{EVAL} --pretrained no-such-owner/no-such-model", 3, "no-such-owner/no-such-model"),
    (f"{EVAL} --pretrained no-such-model", 3, "no-such-model cannot be loaded"),
    (f"{EVAL} --pretrained 'a b'", 3, "no such folder"),
    (f"{EVAL} --pretrained .demo/modl", 3, "no model at .demo/modl: no such folder"),
    ("eval --tasks act_no_task --artifact gone.json --pretrained {model}", 2, "neither a file nor"),
    ("eval --tasks act_no_task --artifact none --pretrained {gone}", 3, "no model at"),
    ("search --tasks act_no_task --output {out}/a.json --pretrained {gone}", 3, "no model at"),
    (f"{EVAL} --pretrained ''", 2, "no model was named"),
    (f"{EVAL} --pretrained {{noconfig}}", 3, "holds no config.json"),
    (f"{EVAL} --pretrained {{badconfig}}", 3, "cannot be loaded"),
    (f"{EVAL} --pretrained {{badjson}}", 3, "cannot be loaded"),
    (f"{EVAL} --pretrained {{noweights}}", 3, "cannot be loaded"),
    (f"{EVAL} --pretrained {{badweights}}", 3, "cannot be loaded"),
    (f"{EVAL} --pretrained {{badtokenizer}}", 3, "cannot be loaded"),
    (f"{EVAL} --pretrained {{otherwords}}", 2, "the tokenizer has .* words and the model"),
    (f"{EVAL} --pretrained {{adapter}}", 2, "holds a peft adapter"),
    (f"{EVAL} --model_args dtype=float32", 2, "no model was named"),
    (f"{EVAL} --model_args pretrianed={{model}}", 2, "did you mean 'pretrianed'|no model was"),
    (f"{MODEL} --model_args pretrained={{empty}}", 2, "give one of them"),
    (f"{MODEL} --model_args dtype", 2, "--model_args cannot be read: expected `key=value`"),
    (f"{MODEL} --model_args '{{{{bad'", 2, "--model_args cannot be read"),
    (f"{MODEL} --model_args dtpye=float32", 2, "'dtpye'; did you mean 'dtype'"),
    (f"{MODEL} --model_args artifcat=none", 2, "'artifcat'; did you mean 'artifact'"),
    (f"{MODEL} --model_args zzz=1", 2, "unknown model argument 'zzz'"),
    (f"{MODEL} --model_args dtype=float33", 2, "dtype=float33 is unknown.*'float32'"),
    (f"{MODEL} --model_args dtype=int8", 2, "dtype=int8 is unknown"),
    (f"{MODEL} --model_args dtype=3", 2, "dtype=3 is unknown"),
    (f"{MODEL} --model_args dtype=nn", 2, "dtype=nn is unknown"),
    (f"{MODEL} --model_args softmax_dtype=half32", 2, "softmax_dtype=half32"),
    (f"{MODEL} --model_args mixed_precision_dtype=x", 2, "mixed_precision_dtype=x"),
    (f"{MODEL} --model_args batch_size=0", 2, "batch_size is '0'"),
    (f"{MODEL} --model_args batch_size=x", 2, "batch_size is 'x'"),
    (f"{MODEL} --model_args batch_size=2 --batch-size 3", 2, "give one of them"),
    (f"{MODEL} --model_args max_length=0", 2, "max_length is 0"),
    (f"{MODEL} --model_args max_length=1", 2, "max_length is 1, expected a whole number of 2"),
    (f"{MODEL} --model_args chat_template_args=3", 2, "chat_template_args=3, expected a mapping"),
    (f"{MODEL} --model_args device_map=zzz", 2, "device_map=zzz is unknown"),
    (f"{MODEL} --model_args device_map=autp", 2, "did you mean 'auto'"),
    (f"{MODEL} --model_args device_map=3.5", 2, "device_map names 3.5"),
    (f"{MODEL} --model_args parallelize=True,device_map=meta", 2, "device_map=meta is unknown"),
    (f"{MODEL} --model_args tp_plan=auto", 2, "tp_plan gives each process a part of the heads"),
    (f"{MODEL} --model_args max_length=x", 2, "max_length is x"),
    (f"{MODEL} --model_args max_length=-5", 2, "max_length is -5"),
    (f"{MODEL} --model_args prefix_token_id=x", 2, "prefix_token_id is x"),
    (f"{MODEL} --model_args revision=main2", 2, "revision=main2 would do nothing"),
    (f"{MODEL} --model_args use_cache=False", 2, "use_cache=False .*would do nothing"),
    (f"{MODEL} --model_args engine=tirton", 2, "tirton"),
    (f"{MODEL} --model_args overlength=cut", 2, "overlength='cut' is unknown"),
    (f"{MODEL} --model_args scoring=fast", 2, "scoring='fast' is unknown"),
    (f"{MODEL} --model_args backend=seq2seq", 2, "causal models only"),
    (f"{MODEL} --model_args attn_implementation=zzz", 3, "cannot be loaded"),
    (f"{MODEL} --model_args tokenizer={{empty}}", 3, "cannot be loaded"),
    (f"{MODEL} --model_args peft={{empty}}", 3, "cannot be loaded"),
    (f"{MODEL} --model_args subfolder=nothing", 3, "holds no config.json"),
    (f"{MODEL} --model_args gguf_file=no.gguf", 3, "cannot be loaded"),
    (f"{MODEL} --model_args max_length={{number}}", 2, "--model_args cannot be read|max_length"),
    (f"{MODEL} --device gpu", 2, "--device is 'cpu'|device 'gpu' is unknown.*did you mean 'cuda'"),
    (
        "eval --tasks act_demo_word --pretrained {model} --artifact none --device gpu",
        2,
        "device 'gpu' is unknown.*did you mean 'cuda'",
    ),
    (
        "eval --tasks act_demo_word --pretrained {model} --artifact none --device cuda:x",
        2,
        "device 'cuda:x' is unknown",
    ),
    (
        "eval --tasks act_demo_word --pretrained {model} --artifact none --device cpu:0",
        2,
        "write 'cpu'",
    ),
    (
        "eval --tasks act_demo_word --pretrained {model} --artifact none --device cuda:977",
        3,
        "this machine has",
    ),
    (
        "eval --tasks act_demo_word --pretrained {model} --artifact none --device xpu:9",
        3,
        "this machine has",
    ),
    (f"{SEARCH} --tasks act_demo_word --pretrained {{gone}}", 3, "no model at"),
    (f"{SEARCH} --tasks act_demo_word --pretrained {{model}} --device gpu", 2, "'gpu'"),
    (
        f"{SEARCH} --tasks act_demo_word --model-args artifact=x,pretrained={{model}}",
        2,
        "leave out artifact=",
    ),
    (f"{SEARCH} --tasks act_demo_word", 2, "no model was named"),
    ("artifact verify {badartifact} {gone}", 2, "'hedas'; did you mean 'heads'"),
    ("artifact verify smollm2-135m-instruct/general {gone}", 3, "no model at"),
    ("bench scoring --pretrained {gone} --tasks act_demo_word --output {out}", 3, "no model at"),
    (f"{MODEL} --data-dir {{gone}}", 2, "gone"),
    (f"{MODEL} --data-dir {{file}}", 2, "file"),
    (f"{MODEL} --data-dir {{long}}", 2, "xxx"),
    (f"{SEARCH} --tasks act_demo_word --pretrained {{model}} --data-dir {{gone}}", 2, "gone"),
    # artifacts
    (f"{MODEL} --artifact nowhere.json", 2, "neither a file nor a shipped artifact"),
    (f"{MODEL} --artifact {{badartifact}}", 2, "'hedas'; did you mean 'heads'"),
    (f"{MODEL} --artifact smollm2-135m-instruct/general", 2, "num_hidden_layers|tokenizer"),
    ("artifact show {gone}", 2, "neither a file nor a shipped"),
    ("artifact show {text}", 2, "is not JSON"),
    ("artifact show {listing}", 2, "is not JSON"),
    ("artifact show {emptyjson}", 2, "name: Field required|schema"),
    ("artifact show hub:owner", 2, "expected hub:OWNER/REPO/FILE"),
    ("artifact show hub:owner/repo", 2, "expected hub:OWNER"),
    ("artifact show hub:owner//file.json", 2, "expected hub:OWNER"),
    ("artifact show hub:owner/repo/file.json@", 2, "expected hub:OWNER"),
    ("artifact show hub:owner/repo/sub/file.json@v1", 2, "cannot be fetched"),
    ("artifact show 'hub:ow ner/repo/file.json'", 2, "cannot be fetched"),
    ("artifact show {deep}", 2, "deep"),
    ("artifact show {digits}", 2, "digits"),
    ("artifact show {twice}", 2, "twice"),
    ("artifact show {nan}", 2, "NaN"),
    ("artifact show {binary}", 2, "UTF-8"),
    ("artifact show {long}", 2, "neither a file nor a shipped"),
    ("artifact show {empty}", 2, "empty"),
    (f"{MODEL} --artifact {{deep}}", 2, "deep"),
    (f"{MODEL} --artifact {{long}}", 2, "neither a file nor a shipped"),
    (f"{MODEL} --model_args artifact={{twice}}", 2, "--artifact is 'none' and .* give one of them"),
    ("artifact verify {deep} {model}", 2, "deep"),
    ("artifact verify smollm2-135m-instruct/general {model}", 2, "num_hidden_layers|tokenizer"),
    ("artifact verify smollm2-135m-instruct/general {long}", 3, "no model at"),
    # search
    (f"{SEARCH} --pretrained {{model}} --tasks act_demo_word --samples 0", 2, "--samples is 0"),
    (f"{SEARCH} --pretrained {{model}} --tasks act_demo_word --samples 1", 2, "of 2 or more"),
    (f"{SEARCH} --pretrained {{model}} --tasks act_demo_word --samples x", 2, "'x'"),
    (f"{SEARCH} --pretrained {{model}} --tasks act_demo_word --seed -3", 2, "--seed is -3"),
    (f"{SEARCH} --pretrained {{model}} --tasks act_demo_word --held-out 3", 2, "--prepare"),
    (f"{SEARCH} --pretrained {{model}} --tasks act_demo_word --held-out -3", 2, "--held-out is -3"),
    (f"{SEARCH} --documents {{text}} --prepare {{out}} --tasks a", 2, "--prepare draws"),
    (f"{SEARCH} --documents {{text}} --data-dir {{own}} --tasks a", 2, "would do nothing"),
    (f"{SEARCH} --documents {{gone}} --tasks a --pretrained {{model}}", 2, "no such file"),
    (
        f"{SEARCH} --documents {{text}} --tasks a --pretrained {{model}}",
        2,
        "is not JSON|holds no search",
    ),
    (f"{SEARCH} --batch-size 4", 2, "No such option: --batch-size"),
    ("search demmo --pretrained {model}", 2, "did you mean 'demo'"),
    ("search {gone} --pretrained {model}", 2, "neither a file nor shipped"),
    ("search {badrecipe} --pretrained {model}", 2, "'sampels'; did you mean 'samples'"),
    ("search {badyaml} --pretrained {model}", 2, "is not YAML"),
    ("search {listing} --pretrained {model}", 2, "holds no settings"),
    ("search {deepyaml} --pretrained {model}", 2, "deepyaml"),
    ("search {binary} --pretrained {model}", 2, "UTF-8"),
    ("search {long} --pretrained {model}", 2, "neither a file nor shipped"),
    (f"{SEARCH} --documents {{deep}} --tasks a --pretrained {{model}}", 2, "deep"),
    (f"{SEARCH} --documents {{long}} --tasks a --pretrained {{model}}", 2, "search --prepare"),
    (f"{SEARCH} --tasks act_demo_word,act_demo_word --pretrained {{model}}", 2, "names one twice"),
    (f"{SEARCH} --tasks act_demo_word --pretrained {{long}}", 3, "no model at"),
    # compare
    ("compare {gone} {empty}", 2, "gone"),
    ("compare {empty} {empty}", 2, "empty"),
    ("compare {text} {text}", 2, "text"),
    ("compare {empty} {empty} --confidence 5", 2, "--confidence is 5.0, expected a number between"),
    ("compare {empty} {empty} --confidence 0", 2, "--confidence is 0"),
    ("compare {empty} {empty} --confidence nan", 2, "--confidence is nan"),
    ("compare {empty} {empty} --alpha nan", 2, "--alpha is nan"),
    ("compare {empty} {empty} --alpha 1", 2, "--alpha is 1"),
    ("compare {empty} {empty} --alpha x", 2, "'x'"),
    ("compare {empty} {empty} --seed -1", 2, "--seed is -1"),
    ("compare {empty} {empty} --seed {number}", 2, "--seed"),
    ("compare {long} {empty}", 2, "xxx"),
    ("compare {deep} {deep}", 2, "deep"),
    ("compare {binary} {binary}", 2, "binary"),
    ("compare {emptyjson} {emptyjson}", 2, "emptyjson"),
    ("compare {digits} {digits}", 2, "digits"),
    # judge
    (f"{JUDGE}", 2, "model"),
    ("judge {gone} --model m --output {out}", 2, "gone"),
    (f"{JUDGE} --model m", 2, "answers"),
    (f"{JUDGE} --model m --base-url ftp://x", 2, "expected an address"),
    (f"{JUDGE} --model m --base-url http://me:secret@x/v1", 2, "no user name, password"),
    (f"{JUDGE} --model m --rejudge 0", 2, "rejudge"),
    (f"{JUDGE} --model m --concurrency 0", 2, "concurrency"),
    (f"{JUDGE} --model m --concurrency 9999", 2, "concurrency"),
    (f"{JUDGE} --model m --retries -1", 2, "retries"),
    (f"{JUDGE} --model m --timeout 0", 2, "timeout"),
    (f"{JUDGE} --model m --timeout nan", 2, "timeout"),
    (f"{JUDGE} --model m --timeout inf", 2, "timeout"),
    (f"{JUDGE} --model m --temperature -1", 2, "temperature"),
    (f"{JUDGE} --model m --temperature nan", 2, "temperature"),
    (f"{JUDGE} --model m --max-tokens 0", 2, "max_tokens"),
    (f"{JUDGE} --model m --max-failure-rate 2", 2, "max_failure_rate"),
    (f"{JUDGE} --model m --price-input -1", 2, "price_input"),
    (f"{JUDGE} --config {{badyaml}}", 2, "cannot be read|YAML"),
    (f"{JUDGE} --config {{listing}}", 2, "found a list, expected settings"),
    (f"{JUDGE} --config {{badrecipe}}", 2, "is unknown"),
    (f"{JUDGE} --config {{gone}}", 2, "gone"),
    ("judge {long} --model m --output {out}", 2, "xxx"),
    (f"{JUDGE} --config {{deepyaml}}", 2, "deepyaml"),
    (f"{JUDGE} --config {{long}}", 2, "xxx"),
    (f"{JUDGE} --model m --seed 3", 2, "No such option: --seed"),
    (f"{JUDGE} --model ''", 2, "model"),
    # regress
    (f"{REGRESS} --suite nosuch", 2, "no suite 'nosuch'"),
    (f"{REGRESS} --suite smolm2-goldens", 2, "did you mean 'smollm2-goldens'"),
    (f"{REGRESS} --suite {{suite}}", 2, "unknown key 'modle'; did you mean 'model'"),
    (f"{REGRESS} --suite {{badyaml}}", 2, "cannot be read|YAML"),
    (f"{REGRESS} --suite {{listing}}", 2, "found a list, expected settings"),
    (f"{REGRESS} --suite smollm2-goldens --limit 0", 2, "--limit is 0"),
    (f"{REGRESS} --suite smollm2-goldens --batch-size x", 2, "--batch-size is 'x'"),
    (f"{REGRESS} --suite smollm2-goldens --batch-size 0", 2, "--batch-size is '0'"),
    (f"{REGRESS} --suite smollm2-goldens --reason why", 2, "--reason belongs to --update"),
    (f"{REGRESS} --suite {{long}}", 2, "no suite"),
    (f"{REGRESS} --suite {{deepyaml}}", 2, "deepyaml"),
    (f"{REGRESS} --suite smollm2-goldens --limit {{number}}", 2, "--limit"),
    (f"{REGRESS} --suite smollm2-goldens --baselines {{gone}}", 2, "no suite"),
    (f"{REGRESS} --suite smollm2-goldens --update", 2, "--reason"),
    (f"{REGRESS} --suite smollm2-goldens --pretrained {{gone}}", 3, "no model at|no baseline"),
    (f"{REGRESS} --suite smollm2-goldens --pretrained {{long}}", 3, "no model at"),
    # run, in lm-eval's own command line
    ("run --model hf-act --model_args pretrained={model}", 2, "no task was named"),
    ("run --model hf-act", 2, "no task was named"),
    (f"{RUN} --limit 0 --model_args pretrained={{model}}", 2, "limit is 0"),
    (f"{RUN} --model_args pretrained={{gone}},artifact=none", 3, "no model at"),
    (f"{RUN} --model_args pretrained={{empty}},artifact=none", 3, "holds no config.json"),
    (f"{RUN} --model_args artifact=none", 2, "no model was named"),
    (f"{RUN} --model_args pretrained={{model}},artifact=none,dtpye=x", 2, "did you mean 'dtype'"),
    (f"{RUN} --model_args pretrained={{model}},artifact=none,dtype=x", 2, "dtype=x is unknown"),
    (f"{RUN} --model_args pretrained={{model}},artifact=nil", 2, "'nil' is neither"),
    (f"{RUN} --model_args pretrained={{model}},artifact=none --batch_size 0", 2, "batch_size"),
    (f"{RUN} --model_args pretrained={{model}},artifact=none --log_samples", 2, "--output_path"),
    (f"{RUN} --model_args pretrained={{model}},artifact=none --device gpu", 2, "'gpu' is unknown"),
    (
        f"{RUN} --model_args pretrained={{model}},artifact=none --fewshot_as_multiturn",
        2,
        "apply_chat_template",
    ),
    (f"{RUN} --config {{badyaml}}", 2, "--config"),
    (f"{RUN} --config {{gone}}", 2, "--config"),
    ("run --model hf-atc --tasks act_demo_word", 2, "did you mean 'hf-act'"),
    (
        "run --model hf-act --model_args pretrained={model} --tasks act_demo_wrod",
        2,
        "did you mean 'act_demo_word'",
    ),
    # bench
    ("bench scoring --tasks act_demo_word", 2, "Missing option '--pretrained'"),
    ("bench scoring --pretrained {model} --limit 0", 2, "--limit"),
    (
        "bench scoring --pretrained {model} --num-fewshot x --tasks act_demo_word",
        2,
        "--num-fewshot holds 'x'",
    ),
    ("bench scoring --pretrained {model} --tasks act_demo_wrod", 2, "did you mean"),
    ("bench search --random huge --output {out}", 2, "shape 'huge' is unknown"),
    ("bench search --random tiny --dtype x --output {out}", 2, "dtype=x is unknown"),
    ("bench search --model {gone} --output {out}", 3, "no model at"),
    ("bench search --output {out}", 2, "no model was named, expected --model"),
    ("bench search --random tiny --loop-heads 0 --output {out}", 2, "found '0', expected a whole"),
    ("bench search --random tiny --keep 2 --output {out}", 2, "found '2', expected a share"),
    ("bench search --random tiny --device gpu --output {out}", 2, "'gpu' is unknown"),
    ("bench search --random tiny --slice 2/2 --output {out}", 2, "expected I/N"),
    ("bench search --join {empty} --output {out}", 2, "no results"),
    ("bench search --smaples 3", 2, "--smaples"),
    ("bench search --random tiny --samples x", 2, "'x'"),
    ("bench memory --shape huge --output {out}", 2, "shape 'huge' is unknown"),
    ("bench memory --contexts x", 2, "'x'"),
    ("bench attention --shapes 1xa --device cpu", 2, "1xa"),
    ("bench prefill --shapes 1xa --device cpu --model {model} --out {out}", 2, "1xa"),
    ("bench decode --model {gone} --device cpu --output {out}", 3, "no model at"),
    ("bench accuracy --tokens x --device cpu", 2, "'x'"),
    ("bench accuracy --dtypes float32,x --device cpu", 2, "dtype=x is unknown"),
    ("bench accuracy --engine tirton --tokens 3 --device cpu --out {out}", 2, "tirton"),
    ("bench attention --engines tirton --device cpu --output {out}", 2, "tirton"),
    ("bench attention --shapes 4 --device cpu --output {out}", 2, "expected a pair such as"),
    ("bench attention --rounds -1 --device cpu --output {out}", 2, "found '-1'"),
    ("bench decode --model {empty} --device cpu --output {out}", 3, "no config.json"),
    ("bench decode --model {long} --device cpu --output {out}", 3, "no model at"),
    ("bench memory --dtype int8 --output {out}", 2, "dtype=int8"),
    ("bench search --random tiny --documents {gone} --output {out}", 2, "no such file"),
    ("bench search --random tiny --documents {deep} --output {out}", 2, "deep"),
    # dashboard
    ("dashboard --from {gone} --wandb-mode offline", 2, "gone"),
    ("dashboard --from {text} --wandb-mode offline", 2, "text"),
    ("dashboard {gone} --wandb-mode offline --output {out}", 2, "gone"),
    ("dashboard --wandb-mode offline --output {file}/d.json", 3, "nothing was computed yet"),
    ("dashboard --wandb-mode offline --output {empty}", 2, "is a folder; name a file in it"),
    ("dashboard --wandb-mode never", 2, "'never'"),
    ("dashboard --from {deep} --wandb-mode offline", 2, "deep"),
    ("dashboard --from {long} --wandb-mode offline", 2, "xxx"),
    ("dashboard {long} --wandb-mode offline", 2, "xxx"),
)
