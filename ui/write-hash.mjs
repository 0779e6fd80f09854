// SHA-256 of the sources beside what was built of them: tests/test_dashboard.py compares, without Node.
import { createHash } from "node:crypto";
import { readFileSync, readdirSync, writeFileSync } from "node:fs";

const files = ["index.html", "package.json", "package-lock.json", "tsconfig.json", "vite.config.ts", "vite.report.config.ts"];
for (const entry of readdirSync("src", { recursive: true, withFileTypes: true })) {
  if (entry.isFile() && !entry.name.includes(".test.")) files.push(`${entry.parentPath}/${entry.name}`);
}
const hash = createHash("sha256");
for (const file of files.map((name) => name.replaceAll("\\", "/")).sort()) {
  hash.update(`${file}\0`).update(readFileSync(file)).update("\0");
}
writeFileSync("../src/polymoe/server/ui/sources.sha256", `${hash.digest("hex")}\n`);
