"""Readers: the files of a published data set in, records out, one at a time.

A reader takes the folder as published and a `Quarantine`. It never repairs a malformed row by guessing and never drops
one in silence: the row goes to the quarantine with its file, its line and the reason. To add a data set, write a
function here and a line in `READERS`.
"""

import csv
import gzip
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from bimedix_jax.data import records
from bimedix_jax.data.quarantine import Quarantine
from bimedix_jax.data.records import Record, Split, Turn, conversation
from bimedix_jax.errors import BimedixError


def medquad(folder: Path, quarantine: Quarantine) -> Iterator[Record]:
    """MedQuAD (Ben Abacha and Demner-Fushman 2019): consumer questions with answers of NIH sites, as gzip JSONL.

    One page gives several questions and pages of different sites treat the same condition, so the provenance carries
    the condition as `group`: splitting by it keeps the same question out of both sides.
    """
    path = _file(folder, "medquad_answered.jsonl.gz")
    seen: Counter[str] = Counter()

    def make(row: dict[str, Any]) -> Record:
        page = f"medquad/{row['source']}/{row['id']}"
        seen[page] += 1
        return Record(
            id=f"{page}/{seen[page]}",
            language="en",
            kind="qa",
            source="medquad",
            licence="CC-BY-4.0",
            conversations=conversation(_tidy(row["question"]).replace(" ?", "?"), _tidy(row["answer"])),
            provenance={
                "url": row["url"],
                "focus": row["focus"],
                "question_type": row["qtype"],
                "group": " ".join(row["focus"].casefold().split()),
            },
        )

    with gzip.open(path, "rb") as file:
        yield from _json_lines("medquad", path, file, quarantine, make)


def medqa_usmle_en(folder: Path, quarantine: Quarantine) -> Iterator[Record]:
    """MedQA (Jin et al. 2020), USMLE, four options: the 1,273 test questions."""
    yield from _multiple_choice("medqa_usmle_en", _file(folder, "medqa_4options_test.jsonl"), "Apache-2.0", quarantine)


def medmcqa_en(folder: Path, quarantine: Quarantine) -> Iterator[Record]:
    """MedMCQA (Pal et al. 2022): the single-choice part of the validation questions, which the field tests on."""
    yield from _multiple_choice("medmcqa_en", _file(folder, "medmcqa_val2816_single.jsonl"), "MIT", quarantine)


def mmlu_medical_en(folder: Path, quarantine: Quarantine) -> Iterator[Record]:
    """Six medical subjects of MMLU (Hendrycks et al. 2021): the canonical 1,089 test questions.

    `test/*.csv` of the same folder is an older state (282 instead of 272 of professional medicine) and is not read.
    """
    yield from _multiple_choice("mmlu_medical_en", _file(folder, "medagents_mmlu_test.jsonl"), "MIT", quarantine)


def mmlu_medical_en_dev(folder: Path, quarantine: Quarantine) -> Iterator[Record]:
    """The development and validation questions of the same six subjects (CSV), for prompts with examples."""
    for part in ("dev", "val"):
        paths = sorted((folder / part).glob(f"*_{part}.csv"))
        if not paths:
            raise BimedixError(f"there is no {part}/*_{part}.csv in {folder}; name the folder of the MMLU CSV files")
        for path in paths:
            subject = path.stem.removesuffix(f"_{part}")
            with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
                for number, row in enumerate(csv.reader(file), start=1):
                    place = (subject, part, number)
                    record = quarantine.build("mmlu_medical_en_dev", path, number, _mmlu_record, *place, row)
                    if record is not None:
                        yield record


def mts_dialog(folder: Path, quarantine: Quarantine) -> Iterator[Record]:
    """MTS-Dialog (Ben Abacha et al. 2023): doctor-patient dialogues (CSV), the training set for training.

    The doctor is `gpt`; patient, relatives and other clinicians are `human`, relatives and clinicians with a label.
    Lines of one side in a row become one turn. Most dialogues open with the doctor: they get the opening "Hello,
    doctor." (provenance: `opening`), and what the patient says after the doctor's last turn is left out (provenance:
    `unanswered_turns`), since no answer follows it.
    """
    parts: dict[str, Split] = {
        "MTS-Dialog-TrainingSet.csv": "train",
        "MTS-Dialog-ValidationSet.csv": "heldout",
        "MTS-Dialog-TestSet-1-MEDIQA-Chat-2023.csv": "heldout",
        "MTS-Dialog-TestSet-2-MEDIQA-Sum-2023.csv": "heldout",
    }
    for name, split in parts.items():
        path = _file(folder, name)
        with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            reader = csv.DictReader(file)
            for row in reader:
                record = quarantine.build("mts_dialog", path, reader.line_num, _dialogue_record, path, row, split)
                if record is not None:
                    yield record


def pubmedqa(folder: Path, quarantine: Quarantine) -> Iterator[Record]:
    """PubMedQA (Jin et al. 2019), labelled part: abstract and question -> yes, no or maybe, and the long answer.

    The 500 ids of the official test set are `heldout`, the others `train`.
    """
    path = _file(folder, "ori_pqal.json")
    rows = _json_object(path)
    test = _json_object(_file(folder, "test_ground_truth.json"))
    missing = sorted(set(test) - set(rows))
    if missing:
        raise BimedixError(
            f"{len(missing)} test ids of {folder} have no row in {path.name} ({missing[0]}); fetch both again"
        )

    def make(pmid: str, row: dict[str, Any]) -> Record:
        choices = ("yes", "no", "maybe")
        decision = row["final_decision"]
        if decision not in choices:
            raise ValueError(f"final_decision is {decision!r}")
        if pmid in test and test[pmid] != decision:
            raise ValueError(f"final_decision is {decision!r}, the ground truth says {test[pmid]!r}")
        abstract = "\n".join(_tidy(context) for context in row["CONTEXTS"])
        question = _tidy(row["QUESTION"])
        return Record(
            id=f"pubmedqa/{pmid}",
            language="en",
            kind="qa",
            source="pubmedqa",
            licence="MIT",
            split="heldout" if pmid in test else "train",
            conversations=conversation(
                f"Abstract: {abstract}\nQuestion: {question}",
                f"{records.ANSWER_PREFIX['en']}{decision}\n{_tidy(row['LONG_ANSWER'])}",
            ),
            choices=choices,
            answer=choices.index(decision),
            provenance={"pmid": pmid, "question": question},
        )

    for number, (pmid, row) in enumerate(rows.items(), start=1):
        record = quarantine.build("pubmedqa", path, number, make, pmid, row)
        if record is not None:
            yield record


def bundled_sample(folder: Path, quarantine: Quarantine) -> Iterator[Record]:
    """The bilingual sample that ships with the package: the one source that is named without a path."""
    if folder != Path():
        raise BimedixError(f"sample takes no path, and {folder} was given; write `sample` alone")
    for record in records.sample():
        quarantine.read["sample"] += 1
        yield record


def own_records(path: Path, quarantine: Quarantine) -> Iterator[Record]:
    """Records already in the project's format: a JSONL file, or a folder of them."""
    paths = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not paths or not paths[0].is_file():
        raise BimedixError(f"there is no JSONL file of records at {path}; name one, or a folder that holds some")
    for file_path in paths:
        with file_path.open("rb") as file:
            yield from _json_lines("records", file_path, file, quarantine, Record.model_validate)


READERS: dict[str, Callable[..., Iterator[Record]]] = {
    "sample": bundled_sample,
    "records": own_records,
    "medquad": medquad,
    "mts_dialog": mts_dialog,
    "pubmedqa": pubmedqa,
    "medqa_usmle_en": medqa_usmle_en,
    "medmcqa_en": medmcqa_en,
    "mmlu_medical_en": mmlu_medical_en,
    "mmlu_medical_en_dev": mmlu_medical_en_dev,
}


def read(source: str, quarantine: Quarantine) -> Iterator[Record]:
    """Records of `NAME=PATH`, of `sample`, or of a path to a JSONL file of records.

    Raises:
        BimedixError: no such reader or folder, or the folder is not laid out as the reader expects.
    """
    name, separator, place = source.partition("=")
    if not separator and name != "sample":
        if not name.endswith(".jsonl"):
            raise BimedixError(
                f"source {source!r} names no path; write NAME=PATH, with NAME one of {', '.join(READERS)}"
            )
        name, place = "records", source
    if name not in READERS:
        raise BimedixError(f"there is no reader {name!r}; the readers are {', '.join(READERS)}")
    path = Path(place).expanduser()
    if name != "sample" and not path.exists():
        raise BimedixError(f"there is no {path}; name the place of the {name} files")
    yield from READERS[name](path, quarantine)


def _multiple_choice(source: str, path: Path, licence: str, quarantine: Quarantine) -> Iterator[Record]:
    """JSONL rows {question, options: {A: ...}, answer_idx, answer, realidx}: test sets, hence all held out."""

    def make(row: dict[str, Any]) -> Record:
        letters = list(row["options"])
        if letters != list(records.LETTERS[: len(letters)]):
            raise ValueError(f"options are lettered {letters}")
        if row["options"].get(row["answer_idx"]) != row["answer"]:
            raise ValueError(f"option {row['answer_idx']!r} is not the stated answer")
        provenance = {"part": "test", "row": row["realidx"]}
        if "subject" in row:
            provenance["subject"] = row["subject"]
        subject = f"{row['subject']}/" if "subject" in row else ""
        choices = tuple(_tidy(choice) for choice in row["options"].values())
        answer = letters.index(row["answer_idx"])
        return _mcqa_record(
            f"{source}/{subject}{row['realidx']}", source, licence, row["question"], choices, answer, provenance
        )

    with path.open("rb") as file:
        yield from _json_lines(source, path, file, quarantine, make)


def _mmlu_record(subject: str, part: str, number: int, row: list[str]) -> Record:
    """A CSV row without header: question, A, B, C, D, letter."""
    if len(row) != 6:
        raise ValueError(f"{len(row)} columns, expected question, four choices and a letter")
    if row[5] not in tuple("ABCD"):
        raise ValueError(f"answer {row[5]!r} is not one of A, B, C, D")
    return _mcqa_record(
        f"mmlu_medical_en/{subject}/{part}/{number}",
        "mmlu_medical_en_dev",
        "MIT",
        row[0],
        tuple(_tidy(choice) for choice in row[1:5]),
        "ABCD".index(row[5]),
        {"part": part, "row": number, "subject": subject},
    )


def _mcqa_record(
    name: str,
    source: str,
    licence: str,
    question: str,
    choices: tuple[str, ...],
    answer: int,
    provenance: dict[str, Any],
) -> Record:
    return Record(
        id=name,
        language="en",
        kind="mcqa",
        source=source,
        licence=licence,
        split="heldout",
        conversations=conversation(
            records.multiple_choice_question(_tidy(question), choices),
            records.multiple_choice_answer(choices, answer, "en"),
        ),
        choices=choices,
        answer=answer,
        provenance=provenance,
    )


# "Gest_family", "Guest_clinican" and numbered guests occur in the published files
_SPEAKER = re.compile(r'^\s*"?\s*(doctor|patient|gu?est_(?:family|clinici?an)(?:_?\d)?)\s*:\s*(.*)$', re.IGNORECASE)


def _dialogue_record(path: Path, row: dict[str, str], split: Split) -> Record:
    turns = _merge_speakers(_tidy(row["dialogue"]))
    provenance: dict[str, Any] = {"file": path.name, "row": row["ID"], "section": row["section_header"]}
    if turns and turns[0].speaker == "gpt":
        turns.insert(0, Turn(speaker="human", value="Hello, doctor."))
        provenance["opening"] = "added"
    if turns and turns[-1].speaker == "human":
        turns.pop()
        provenance["unanswered_turns"] = 1
    if not turns:
        raise ValueError("the doctor says nothing")
    return Record(
        id=f"mts_dialog/{path.stem.removeprefix('MTS-Dialog-')}/{row['ID']}",
        language="en",
        kind="chat",
        source="mts_dialog",
        licence="CC-BY-4.0",
        split=split,
        conversations=tuple(turns),
        provenance=provenance,
    )


def _merge_speakers(dialogue: str) -> list[Turn]:
    """Turns of "Doctor: ..." lines. A line without a speaker goes on with the one before it."""
    sides: list[tuple[str, list[str]]] = []
    for line in dialogue.splitlines():
        if not line.strip():
            continue
        match = _SPEAKER.match(line)
        if match is None:
            if not sides:
                raise ValueError("the first line names no speaker")
            sides[-1][1].append(line.strip())
            continue
        who, text = match[1].lower(), match[2].strip()
        side = "gpt" if who == "doctor" else "human"
        if "family" in who:
            text = f"Family member: {text}"
        elif "clinic" in who:
            text = f"Clinician: {text}"
        if not text:
            continue
        if sides and sides[-1][0] == side:
            sides[-1][1].append(text)
        else:
            sides.append((side, [text]))
    return [Turn.model_validate({"from": side, "value": "\n".join(texts)}) for side, texts in sides]


def _tidy(text: str) -> str:
    """Without runs of spaces, carriage returns and blank ends; line breaks stay."""
    text.encode("utf-8")  # UnicodeEncodeError, a ValueError, where the file was not valid UTF-8
    return re.sub(r"[ \t\xa0]+", " ", text.replace("\r\n", "\n").replace("\r", "\n")).strip()


def _json_lines(
    source: str, path: Path, file: IO[bytes] | gzip.GzipFile, quarantine: Quarantine, make: Callable[[Any], Record]
) -> Iterator[Record]:
    def parsed(line: bytes) -> Record:
        return make(json.loads(line))

    for number, line in enumerate(file, start=1):
        if line.strip():
            record = quarantine.build(source, path, number, parsed, line)
            if record is not None:
                yield record


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BimedixError(f"{path} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise BimedixError(f"{path} holds a {type(value).__name__}, not an object; fetch it again")
    return value


def _file(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise BimedixError(f"there is no {name} in {folder}; name the folder that holds the published files")
    return path
