/** One prompt to several variants at once, their answers side by side. */

import { useMemo, useRef, useState } from "preact/hooks";
import { type Answer, ask, body, EMPTY, type Language, type Settings, snippet, type Token } from "./ask";
import { differs, pieces } from "./diff";
import { percent, seconds, short } from "./format";
import type { Bundle } from "./types";

const LANGUAGES: Language[] = ["curl", "Python", "JavaScript"];

export function Playground({ bundle }: { bundle: Bundle }) {
  const served = Object.keys(bundle.engine?.chat ?? {}).filter((name) => bundle.engine?.faults[name] === undefined);
  const chats = served.some((name) => bundle.engine?.chat[name] === true);
  const [settings, setSettings] = useState<Settings>({
    chat: chats,
    system: "",
    prompt: "",
    temperature: "0",
    topP: "",
    maxTokens: "128",
    seed: "",
    schema: "",
    tools: "",
    alternatives: true,
  });
  const [asked, setAsked] = useState<string[]>(served.slice(0, 4));
  const [answers, setAnswers] = useState<Record<string, Answer>>({});
  const [code, setCode] = useState<{ language: Language; text: string } | null>(null);
  const [problem, setProblem] = useState("");
  const running = useRef<AbortController | null>(null);
  const [busy, setBusy] = useState(false);

  function set(change: Partial<Settings>): void {
    setSettings({ ...settings, ...change });
    setCode(null);
  }

  async function run(): Promise<void> {
    running.current?.abort();
    const control = new AbortController();
    setProblem("");
    try {
      body(settings, "");
    } catch (error) {
      setProblem(error instanceof Error ? error.message : String(error));
      return;
    }
    running.current = control;
    setBusy(true);
    setAnswers(Object.fromEntries(asked.map((name) => [name, EMPTY])));
    await Promise.all(
      asked.map((name) =>
        ask(settings, name, control.signal, (answer) => {
          if (running.current === control) setAnswers((before) => ({ ...before, [name]: answer }));
        }),
      ),
    );
    if (running.current === control) setBusy(false);
  }

  function copy(language: Language): void {
    try {
      const text = snippet(language, settings, asked[0] ?? served[0] ?? "", location.origin);
      setCode({ language, text });
      void navigator.clipboard.writeText(text).catch(() => undefined); // the text stands below all the same
    } catch (error) {
      setProblem(error instanceof Error ? error.message : String(error));
    }
  }

  function save(): void {
    const content = JSON.stringify({ time: new Date().toISOString(), settings, answers }, null, 2);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([content], { type: "application/json" }));
    link.download = "polymoe-playground.json";
    link.click();
    URL.revokeObjectURL(link.href);
  }

  const shown = asked.filter((name) => answers[name] !== undefined);
  const reference = shown[0];
  return (
    <div>
      <form
        class="card wide ask"
        onSubmit={(event) => {
          event.preventDefault();
          void run();
        }}
      >
        <fieldset class="inline">
          <legend>Kind</legend>
          <label>
            <input type="radio" name="kind" checked={settings.chat} disabled={!chats} onChange={() => { set({ chat: true }); }} />
            chat
          </label>
          <label>
            <input type="radio" name="kind" checked={!settings.chat} onChange={() => { set({ chat: false }); }} />
            completion
          </label>
        </fieldset>
        <fieldset class="inline">
          <legend>Variants</legend>
          {served.map((name) => (
            <label key={name}>
              <input
                type="checkbox"
                checked={asked.includes(name)}
                onChange={(event) => {
                  const on = event.currentTarget.checked;
                  setAsked(served.filter((other) => (other === name ? on : asked.includes(other))));
                }}
              />
              {name}
            </label>
          ))}
        </fieldset>
        {settings.chat ? <Text label="System message" rows={1} value={settings.system} onText={(system) => { set({ system }); }} /> : null}
        <Text label={settings.chat ? "Message" : "Prompt"} rows={3} value={settings.prompt} onText={(prompt) => { set({ prompt }); }} />
        <div class="inline">
          <Number label="Tokens" value={settings.maxTokens} onText={(maxTokens) => { set({ maxTokens }); }} />
          <Number label="Temperature" value={settings.temperature} onText={(temperature) => { set({ temperature }); }} />
          <Number label="Top p" value={settings.topP} onText={(topP) => { set({ topP }); }} />
          <Number label="Seed" value={settings.seed} onText={(seed) => { set({ seed }); }} />
          <label>
            <input
              type="checkbox"
              checked={settings.alternatives}
              onChange={(event) => { set({ alternatives: event.currentTarget.checked }); }}
            />
            alternatives of each token
          </label>
        </div>
        <details>
          <summary>JSON schema and tools</summary>
          <Text label="JSON schema of the answer" rows={4} value={settings.schema} onText={(schema) => { set({ schema }); }} />
          {settings.chat ? <Text label="Tools (a JSON list)" rows={4} value={settings.tools} onText={(tools) => { set({ tools }); }} /> : null}
        </details>
        <div class="inline">
          <button type="submit" class="main" disabled={settings.prompt === "" || asked.length === 0}>
            Ask {asked.length} {asked.length === 1 ? "variant" : "variants"}
          </button>
          <button type="button" disabled={!busy} onClick={() => { running.current?.abort(); }}>
            Stop
          </button>
          {LANGUAGES.map((language) => (
            <button key={language} type="button" onClick={() => { copy(language); }}>
              Copy as {language}
            </button>
          ))}
          <button type="button" disabled={shown.length === 0} onClick={save}>
            Export
          </button>
        </div>
        {problem === "" ? null : <p class="error" role="alert">{problem}</p>}
        {code === null ? null : (
          <pre class="command" tabIndex={0} aria-label={`The request as ${code.language}, copied`}>{code.text}</pre>
        )}
      </form>
      <div class="answers">
        {shown.map((name) => (
          <Reply
            key={name}
            name={name}
            answer={answers[name] ?? EMPTY}
            reference={name === reference || reference === undefined ? null : (answers[reference] ?? null)}
            against={reference ?? ""}
          />
        ))}
      </div>
    </div>
  );
}

interface FieldProps {
  label: string;
  value: string;
  onText: (text: string) => void;
}

function Text({ label, value, rows, onText }: FieldProps & { rows: number }) {
  return (
    <label class="block">
      {label}
      <textarea rows={rows} value={value} onInput={(event) => { onText(event.currentTarget.value); }} />
    </label>
  );
}

function Number({ label, value, onText }: FieldProps) {
  return (
    <label>
      {label}
      <input type="text" inputMode="decimal" size={6} value={value} onInput={(event) => { onText(event.currentTarget.value); }} />
    </label>
  );
}

interface ReplyProps {
  name: string;
  answer: Answer;
  reference: Answer | null;
  against: string;
}

function split(answer: Answer): string[] {
  return answer.tokens.length > 0 ? answer.tokens.map((token) => token.text) : pieces(answer.text);
}

function Reply({ name, answer, reference, against }: ReplyProps) {
  const [at, setAt] = useState<number | null>(null);
  const own = split(answer);
  const finished = answer.duration !== null && reference !== null && reference.duration !== null;
  const other = useMemo(
    () => (finished ? differs(split(reference), own) : null),
    [finished, answer.text, reference?.text],
  );
  const token = at === null ? undefined : answer.tokens[at];
  const rate =
    answer.firstToken === null || answer.count < 2 || answer.duration === null
      ? null
      : (answer.count - 1) / Math.max(answer.duration - answer.firstToken, 1e-3);

  function onKey(event: KeyboardEvent): void {
    const step = event.key === "ArrowRight" ? 1 : event.key === "ArrowLeft" ? -1 : 0;
    if (step === 0 || own.length === 0) return;
    event.preventDefault();
    setAt(Math.min(own.length - 1, Math.max(0, (at ?? -1) + step)));
  }

  return (
    <article class="card reply" aria-labelledby={`reply-${name}`} data-state={answer.duration === null ? "running" : "done"}>
      <h3 id={`reply-${name}`}>{name}</h3>
      <p
        class="answer"
        tabIndex={0}
        role="group"
        aria-label={`Answer of ${name}${answer.tokens.length > 0 ? "; left and right choose a token" : ""}`}
        onKeyDown={onKey}
        onMouseLeave={() => { setAt(null); }}
      >
        {own.map((piece, i) => (
          <span
            key={i}
            class={`${other?.[i] === true ? "differs" : ""}${i === at ? " chosen" : ""}`}
            onMouseEnter={answer.tokens.length > 0 ? () => { setAt(i); } : undefined}
          >
            {piece}
          </span>
        ))}
      </p>
      {token === undefined ? null : <Alternatives token={token} />}
      {answer.error === null ? null : <p class="error" role="alert">{answer.error}</p>}
      <p class="muted">
        {answer.count} tokens · {rate === null ? "–" : short(rate)} tok/s · first after {seconds(answer.firstToken)}
        {answer.finish === null ? "" : ` · ${answer.finish}`}
        {other === null ? "" : ` · ${String(other.filter(Boolean).length)} of ${String(other.length)} differ from ${against}`}
      </p>
    </article>
  );
}

function Alternatives({ token }: { token: Token }) {
  return (
    <table class="alternatives">
      <caption>
        <code>{JSON.stringify(token.text)}</code> with {percent(Math.exp(token.logprob))}; most likely there:
      </caption>
      <tbody>
        {token.top.map(([text, logprob]) => (
          <tr key={text}>
            <th scope="row">
              <code>{JSON.stringify(text)}</code>
            </th>
            <td>{percent(Math.exp(logprob))}</td>
          </tr>
        ))}
      </tbody>
    </table>
  );
}
