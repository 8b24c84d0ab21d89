-- Open a new epoch by compare-and-set. KEYS: meta, epoch, log.
-- ARGV: number and nonce of the epoch that the caller saw ("" if none), the new nonce, a number to be above (a promise),
-- entry id, region, voters (JSON; "" keeps those of the epoch before), forgotten keeper ids (JSON list; "" for none), "1"
-- if the caller may do it only where some of the log is missing, and what meta is made of if that is missing:
-- incarnation ("" if the caller may not make it), format, min_reader_format, max_token_lifetime_s; and the holes that the
-- caller found in the log (JSON list of pairs; "" keeps those that an epoch before has named); and the epoch for which the
-- voters were chosen (JSON; "" for this one).
-- Returns {"bumped", number}, {"lost"} if things are not as the caller saw them, or {"waiting"} if there is no meta.
local replid, refusal = master_replid()
if not replid then
  return refusal
end

local held = redis.call('HMGET', KEYS[2], 'number', 'nonce', 'chain')
local number, nonce, chain = held[1] or '', held[2] or '', decode_links(held[3] or nil)
if number ~= ARGV[1] or nonce ~= ARGV[2] then
  return {'lost'}
end
if ARGV[9] == '1' and redis.call('EXISTS', KEYS[1], KEYS[2], KEYS[3]) == 3 then
  return {'lost'}
end

if redis.call('EXISTS', KEYS[1]) == 0 then
  if ARGV[10] == '' then
    return {'waiting'}
  end
  redis.call('HSET', KEYS[1], 'incarnation', ARGV[10], 'trimmed_to', '', 'writer_format', ARGV[11],
    'min_reader_format', ARGV[12], 'max_token_lifetime_s', ARGV[13])
end

local now_ms = server_ms()
local last = redis.call('XREVRANGE', KEYS[3], '+', '-', 'COUNT', 1)[1]
local last_number = last and string.match(last[1], '^(%d+)-') or '0'
local following = string.format('%.0f', math.max(
  tonumber(number ~= '' and number or '0') + 1, tonumber(ARGV[4]) + 1, tonumber(last_number) + 1, tonumber(now_ms)))

-- The last position before this epoch, with the nonce that its epoch has in this history.
local previous
for _, link in ipairs(chain) do
  if last and string.format('%.0f', link.number) == last_number then
    previous = last[1] .. '.' .. link.nonce
  end
end

local voters, chosen = ARGV[7], ARGV[15] ~= '' and cjson.decode(ARGV[15]) or nil
if voters == '' then
  local before = chain[#chain]
  voters = before and cjson.encode(before.voters) or '{}'
  chosen = before and (before.chosen or {before.number, before.nonce}) or nil
end
local link = {number = tonumber(following), nonce = ARGV[3], previous = previous or cjson.null,
  voters = cjson.decode(voters), opened = false, chosen = chosen}
if ARGV[8] ~= '' then
  link.forgotten = cjson.decode(ARGV[8])
end
table.insert(chain, link)

redis.call('XADD', KEYS[3], following .. '-0', 'v', '1', 'id', ARGV[5], 'kind', 'epoch', 'issuer', '',
  'value', ARGV[3] .. ' ' .. (previous or '-'), 'before', '', 'expires_at', '0', 'reason', '', 'at', now_ms,
  'region', ARGV[6])
redis.call('HSET', KEYS[2], 'number', following, 'nonce', ARGV[3], 'replid', replid, 'open', '0', 'keys_n', '0',
  'voters', voters, 'chain', encode_links(chain))
if ARGV[14] ~= '' then
  redis.call('HSET', KEYS[2], 'holes', ARGV[14])
end
return {'bumped', following}
