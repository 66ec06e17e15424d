"""How pages are shown in tests: devices, flags, patience."""

LAPTOP = {"viewport": {"width": 1366, "height": 860}}
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "has_touch": True, "is_mobile": True}
# Nothing that a browser does on its own account, and no need for a GPU or for privileges.
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync",
]  # fmt: skip
# Milliseconds; a busy machine is slow, and nothing here measures speed.
PATIENCE = 30_000


def fits_its_width(page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
