// Screen readers announce the repainted image.

element.setAttribute("aria-live", "polite");
