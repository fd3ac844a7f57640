"""The quickstart's page in a browser."""

import chromium
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bimedix_jax.quickstart import page


def test_the_page_is_legible_on_a_telephone_on_a_screen_and_in_print(browser, tmp_path):
    FigureCanvasAgg(figure := Figure(figsize=(12, 4)))
    figure.savefig(tmp_path / "loss.png")
    losses = {f"{language}/{kind}": 5.0 for language in ("en", "ar") for kind in ("qa", "mcqa", "chat")}
    parts = [
        page.paragraph(
            "bimedix_jax 0.1.0, seed 0; 1 x cpu; AMD EPYC, 2 cores, Linux-6.18.44-fc-v669-x86_64-with-glibc2.36"
        ),
        page.picture(tmp_path / "loss.png", "Loss"),
        page.before_after("bits per byte", losses, losses),
        page.table(
            ("language", "before", "after", "questions", "chance"), [("ar", *["0.0 [0.0, 79.3]"] * 2, "1", "25.0")]
        ),
        page.paragraph("ما أعراض انخفاض سكر الدم وكيف يعالج؟", "ar"),
        page.paragraph("الماء " * 90, "ar", "answer"),
        page.commands(["bimedix chat --model /a/folder/with-a-long-name/and-another-one/runs/quickstart/model --json"]),
    ]
    chromium.check(browser, page.write_page(tmp_path / "report.html", "bimedix quickstart", parts))
