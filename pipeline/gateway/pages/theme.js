// Applies the chosen theme before the first paint. The default is the system's.
"use strict";
try {
  const theme = localStorage.getItem("headrace-theme");
  if (theme) document.documentElement.dataset.theme = theme;
} catch { /* no storage: the system's */ }
