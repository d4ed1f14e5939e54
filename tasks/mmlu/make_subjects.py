"""Write the files of the 57 MMLU subjects and their groups into this folder.

Run it after a change to :data:`CATEGORIES`: ``python tasks/mmlu/make_subjects.py``. What all
subjects share stands in ``_mmlu_yaml`` and is edited there, not here.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["CATEGORIES", "files"]

# The four categories of Hendrycks et al., "Measuring Massive Multitask Language Understanding"
# (ICLR 2021), as lm-evaluation-harness groups them.
CATEGORIES: dict[str, tuple[str, ...]] = {
    "stem": (
        "abstract_algebra",
        "anatomy",
        "astronomy",
        "college_biology",
        "college_chemistry",
        "college_computer_science",
        "college_mathematics",
        "college_physics",
        "computer_security",
        "conceptual_physics",
        "electrical_engineering",
        "elementary_mathematics",
        "high_school_biology",
        "high_school_chemistry",
        "high_school_computer_science",
        "high_school_mathematics",
        "high_school_physics",
        "high_school_statistics",
        "machine_learning",
    ),
    "humanities": (
        "formal_logic",
        "high_school_european_history",
        "high_school_us_history",
        "high_school_world_history",
        "international_law",
        "jurisprudence",
        "logical_fallacies",
        "moral_disputes",
        "moral_scenarios",
        "philosophy",
        "prehistory",
        "professional_law",
        "world_religions",
    ),
    "social_sciences": (
        "econometrics",
        "high_school_geography",
        "high_school_government_and_politics",
        "high_school_macroeconomics",
        "high_school_microeconomics",
        "high_school_psychology",
        "human_sexuality",
        "professional_psychology",
        "public_relations",
        "security_studies",
        "sociology",
        "us_foreign_policy",
    ),
    "other": (
        "business_ethics",
        "clinical_knowledge",
        "college_medicine",
        "global_facts",
        "human_aging",
        "management",
        "marketing",
        "medical_genetics",
        "miscellaneous",
        "nutrition",
        "professional_accounting",
        "professional_medicine",
        "virology",
    ),
}


def files() -> dict[str, str]:
    """Return what this script writes: path below this folder to content."""
    written = {}
    for subjects in CATEGORIES.values():
        for subject in subjects:
            written[f"subjects/{subject}.yaml"] = (
                f"include: ../_mmlu_yaml\ntask: act_mmlu_{subject}\ndataset_name: {subject}\n"
            )
            written[f"subjects_gen/{subject}_gen.yaml"] = (
                f"include: [../subjects/{subject}.yaml, ../../multiple_choice/_one_letter_yaml]\n"
                f"task: act_mmlu_{subject}_gen\n"
            )
    for suffix, metric in (("", "acc"), ("_gen", "exact_match")):
        for category, subjects in CATEGORIES.items():
            members = [f"act_mmlu_{subject}{suffix}" for subject in subjects]
            name = f"act_mmlu_{category}{suffix}"
            written[f"groups/{category}{suffix}.yaml"] = _group(name, members, metric)
        categories = [f"act_mmlu_{category}{suffix}" for category in CATEGORIES]
        written[f"groups/mmlu{suffix}.yaml"] = _group(f"act_mmlu{suffix}", categories, metric)
    return written


def _group(name: str, members: list[str], metric: str) -> str:
    """Return the file of a group whose score is the unweighted mean over its subjects."""
    listed = "".join(f"  - {member}\n" for member in members)
    return (
        f"group: {name}\ntask:\n{listed}"
        f"aggregate_metric_list:\n  - metric: {metric}\n    weight_by_size: false\n"
        "metadata:\n  version: 1.0\n"
    )


def main() -> None:
    """Write the files beside this script."""
    for path, content in files().items():
        target = Path(__file__).parent / path
        target.parent.mkdir(exist_ok=True)
        target.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
