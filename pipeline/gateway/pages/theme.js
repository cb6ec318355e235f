// The chosen theme, before anything is drawn; without a choice it is the system's.
"use strict";
try {
  const theme = localStorage.getItem("headrace-theme");
  if (theme) document.documentElement.dataset.theme = theme;
} catch { /* no storage: the system's */ }
