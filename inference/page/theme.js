// Runs before the page is painted, so that a chosen theme never flashes.
document.documentElement.dataset.theme = localStorage.getItem("theme") ?? "";
