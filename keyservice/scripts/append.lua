-- Append entries to the log, and name epochs. KEYS: log, epoch, beat, and meta, without which only kinds of format 1 are
-- taken. ARGV: number, nonce, the epochs that the caller knows (JSON, "" for none), then per entry nine fields (id, kind,
-- issuer, value, before, expires_at, reason, at, region); an `at` of 0 becomes the server's time. Returns {first seq,
-- last seq ("" for no entries), the server's time (ms), the newest beat of this epoch (-1: none)}.
local refusal = check_epoch(KEYS[2], ARGV[1], ARGV[2])
if refusal then
  return refusal
end
if redis.call('EXISTS', KEYS[1]) == 0 then  -- a new one would begin at 0 again, at places that keepers have reported
  return redis.error_reply('TRUST_NO_EPOCH there is no log')
end

-- KIND_FORMATS of verifier/log.py. A kind that readers need not know yet would be skipped by some of them in silence.
local kind_formats = {all = 1, client = 1, epoch = 1, jti = 1, kid = 1, sid = 1, sub = 1, tok = 1}
local needed = 1
for i = 4, #ARGV, 9 do
  local format = kind_formats[ARGV[i + 1]]
  if not format then
    return redis.error_reply('TRUST_KIND no kind of this release')
  end
  needed = math.max(needed, format)
end
if needed > 1 then
  refusal = check_readers(KEYS[4], needed)
  if refusal then
    return refusal
  end
end

local now_ms = server_ms()
local auto_id = ARGV[1] .. '-*'
local first, last = '', ''
for i = 4, #ARGV, 9 do
  last = redis.call('XADD', KEYS[1], auto_id,
    'v', '1', 'id', ARGV[i], 'kind', ARGV[i + 1], 'issuer', ARGV[i + 2], 'value', ARGV[i + 3],
    'before', ARGV[i + 4], 'expires_at', ARGV[i + 5], 'reason', ARGV[i + 6],
    'at', ARGV[i + 7] == '0' and now_ms or ARGV[i + 7], 'region', ARGV[i + 8])
  if first == '' then
    first = last
  end
end

if ARGV[3] ~= '' then
  local held = redis.call('HMGET', KEYS[2], 'chain', 'known')
  local chain, known = decode_links(held[1]), decode_links(held[2])
  local by_key = {}
  local function key(link)
    return string.format('%.0f.', link.number) .. link.nonce
  end
  for _, links in ipairs({known, chain}) do
    for _, link in ipairs(links) do
      by_key[key(link)] = link
    end
  end
  for _, link in ipairs(cjson.decode(ARGV[3])) do
    local mine = by_key[key(link)]
    if not mine then
      table.insert(known, link)
    elseif link.opened then
      mine.opened = true
    end
  end
  redis.call('HSET', KEYS[2], 'chain', encode_links(chain), 'known', encode_links(known))
end

local beat = redis.call('HMGET', KEYS[3], 'nonce', 'n')
return {string.match(first, '-(%d+)$') or '', string.match(last, '-(%d+)$') or '', now_ms,
  beat[1] == ARGV[2] and beat[2] or '-1'}
