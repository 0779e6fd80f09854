/** Which pieces of an answer are not in another: all that is outside their longest common subsequence. */

const MOST = 700; // pieces; longer answers are compared up to there

export function pieces(text: string): string[] {
  return text.match(/\s*\S+|\s+$/g) ?? [];
}

/** For each piece of `b`, whether it differs from `a`. */
export function differs(a: readonly string[], b: readonly string[]): boolean[] {
  const rows = Math.min(a.length, MOST);
  const columns = Math.min(b.length, MOST);
  const wide = columns + 1;
  const length = new Uint16Array((rows + 1) * wide);
  for (let i = rows - 1; i >= 0; i--) {
    for (let j = columns - 1; j >= 0; j--) {
      length[i * wide + j] =
        a[i] === b[j]
          ? (length[(i + 1) * wide + j + 1] ?? 0) + 1
          : Math.max(length[(i + 1) * wide + j] ?? 0, length[i * wide + j + 1] ?? 0);
    }
  }
  const found = b.map(() => true);
  let i = 0;
  let j = 0;
  while (i < rows && j < columns) {
    if (a[i] === b[j]) {
      found[j] = false;
      i += 1;
      j += 1;
    } else if ((length[(i + 1) * wide + j] ?? 0) >= (length[i * wide + j + 1] ?? 0)) i += 1;
    else j += 1;
  }
  return found;
}
